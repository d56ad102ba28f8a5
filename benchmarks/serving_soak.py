"""Loads a server with all that may happen to it, and sees that every request is answered once, and rightly.

Several clients send requests for small pictures of few steps: some they wait for, some they follow step by step, some
they give up by ``DELETE`` or by hanging up, and some are wrong. In the first half ranks are killed. A picture has to be
what the pipeline makes of the same request alone; in the second half no process may grow.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from serving_client import READY_S, Answer, Server, Watch, alone, serving

COLOURS = ("red", "blue", "green", "yellow")
SHAPES = ("circle", "square", "star", "triangle")
STEPS = (2, 3, 4)
SIDE = 64
APART = 1
"""A picture may be so far from that of the pipeline alone, of 255."""
GROWTH = 0.05
"""Resident memory may grow by so much in the second half."""
KINDS = {"plain": 66, "stream": 10, "delete": 8, "gone": 8, "bad": 8}
BAD: tuple[bytes, ...] = (
    b"{",
    b"[]",
    b'{"prompt": 5}',
    json.dumps({"prompt": "x" * 1_000_000}).encode(),
    b'{"prompt": "a", "height": 100000, "width": 100000}',
    b'{"prompt": "a", "height": 33, "width": 33}',
    b'{"prompt": "a", "seed": "one"}',
    b'{"prompt": "a", "n": 100000}',
    b'{"prompt": "a", "arguments": {"nothing": 1}}',
    b'{"prompt": "a", "num_inference_steps": -1}',
)


@dataclasses.dataclass
class Seen:
    """What a run showed.

    Attributes:
        counts: requests by kind and by what came of them.
        problems: what must not be.
        ids: that requests were sent with, whose answer was waited for.
        memory: (requests ended, process, resident bytes) again and again.
        recoveries: seconds from a kill to ready.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    problems: list[str] = dataclasses.field(default_factory=list)
    ids: list[str] = dataclasses.field(default_factory=list)
    memory: list[tuple[int, str, int]] = dataclasses.field(default_factory=list)
    recoveries: list[float] = dataclasses.field(default_factory=list)
    ended: int = 0


class Soak:
    """Clients of one server.

    Args:
        server: with ``--retry``.
        requests: how many are sent in all.
        seed: of what is sent when.
    """

    def __init__(self, server: Server, requests: int, seed: int):
        self.seen = Seen()
        self._server, self._requests = server, requests
        self._random = random.Random(seed)
        self._lock, self._numbers = threading.Lock(), iter(range(requests))
        self._sorts, self._expected = _different(
            [
                {"prompt": f"a {colour} {shape}", "seed": 7 * number + 1, "height": SIDE, "width": SIDE,
                 "num_inference_steps": STEPS[number % len(STEPS)]}
                for number, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES))
            ]
        )  # fmt: skip

    def client(self) -> None:
        """Send requests until all were sent."""
        sends: dict[str, Callable[[str, int], str]] = {
            "plain": self._plain, "stream": self._stream, "delete": self._delete, "gone": self._gone, "bad": self._bad,
        }  # fmt: skip
        while True:
            with self._lock:
                number = next(self._numbers, None)
                kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
                sort = self._random.randrange(len(self._sorts))
            if number is None:
                return
            try:
                what = sends[kind](f"{kind}-{number}", sort)
            except Exception as error:
                self._wrong(f"{kind}-{number}: {type(error).__name__}: {error}")
                what = "no answer"
            with self._lock:
                self.seen.counts[f"{kind}: {what}"] += 1
                self.seen.ended += 1
                if self.seen.ended % 10 == 0:
                    self._look()
                if self.seen.ended % 100 == 0:
                    click.echo(f"{self.seen.ended} requests ended, {len(self.seen.problems)} wrong", err=True)

    def kill(self) -> None:
        """End one rank, and wait until the server is ready again."""
        rank = self._random.choice(self._server.ranks())
        rank.kill()
        begin = time.monotonic()
        while self._server.get("/health/ready")[0] == 200:
            if time.monotonic() - begin > 60:
                self._wrong("the loss of a rank was not seen within 60 s")
                return
        self._server.wait_ready()
        self.seen.recoveries.append(time.monotonic() - begin)

    def finish(self, log: Path) -> None:
        """See that nothing is left at work, and that the server answered each request once."""
        limit = time.monotonic() + 30
        while True:
            status = json.loads(self._server.get("/v1/status")[1])
            if not status["running"] and not status["queued"]:
                break
            if time.monotonic() > limit:
                self._wrong(f"requests are left: {status}")
                break
            time.sleep(0.1)
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        told = collections.Counter(line["request_id"] for line in lines if line.get("method") == "POST")
        for id in self.seen.ids:
            if told[id] != 1:
                self._wrong(f"{id} was answered {told[id]} times")

    def _plain(self, id: str, sort: int) -> str:
        answer = self._asked(id, sort)
        self._compare(id, sort, answer)
        return str(answer.status)

    def _stream(self, id: str, sort: int) -> str:
        self.seen.ids.append(id)
        step, pictures, retried = 0, [], 0
        for event in self._server.events(**self._sorts[sort], id=id):
            name = event.get("type", "error").rpartition(".")[2]
            if name == "retried":
                step, retried = 0, retried + 1
            elif name == "progress":
                if event["step"] <= step:
                    self._wrong(f"{id}: step {event['step']} after step {step}")
                step = event["step"]
            elif name == "completed":
                pictures.append(Answer(200, {"data": [event]}, 0.0))
            elif name == "error":
                self._wrong(f"{id}: {event}")
        if len(pictures) != 1 or step != self._sorts[sort]["num_inference_steps"]:
            self._wrong(f"{id}: {len(pictures)} pictures after {step} steps")
        for each in pictures:
            self._compare(id, sort, each)
        return "200, retried" if retried else "200"

    def _delete(self, id: str, sort: int) -> str:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self._asked, id, sort)
            time.sleep(self._random.uniform(0, 1))
            deleted = self._server.cancel(id)
            answer = asked.result()
        if (deleted, answer.status) not in ((200, 499), (404, 200)):
            self._wrong(f"{id}: DELETE gave {deleted}, but the request {answer.status}: {answer.body}")
        if answer.status == 200:
            self._compare(id, sort, answer)
        return str(answer.status)

    def _gone(self, id: str, sort: int) -> str:
        to = http.client.HTTPConnection(self._server.address.removeprefix("http://"), timeout=30)
        headers = {"Content-Type": "application/json", "X-Request-Id": id}
        to.request("POST", "/v1/images/generations", json.dumps(self._sorts[sort]), headers)
        time.sleep(self._random.uniform(0, 1))
        to.close()
        return "hung up"

    def _bad(self, id: str, sort: int) -> str:
        body = BAD[sort % len(BAD)]
        self.seen.ids.append(id)
        to = http.client.HTTPConnection(self._server.address.removeprefix("http://"), timeout=READY_S)
        to.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json", "X-Request-Id": id})
        answer = to.getresponse()
        reason = json.loads(answer.read()).get("error", {}).get("message")
        to.close()
        if not (400 <= answer.status < 500 and reason):
            self._wrong(f"{id}: {body[:80]!r} gave {answer.status}: {reason}")
        return str(answer.status)

    def _asked(self, id: str, sort: int) -> Answer:
        self.seen.ids.append(id)
        return self._server.ask(**self._sorts[sort], id=id)

    def _compare(self, id: str, sort: int, answer: Answer) -> None:
        if answer.status != 200:
            self._wrong(f"{id}: {answer.status}: {answer.body}")
            return
        apart = np.abs(answer.picture - self._expected[sort]).max()
        if len(answer.body["data"]) != 1 or apart > APART:
            others = [n for n, each in enumerate(self._expected) if np.abs(answer.picture - each).max() <= APART]
            self._wrong(f"{id}: {apart} of 255 from its picture; is that of {others}, not of {sort}")

    def _look(self) -> None:
        processes = {"front": psutil.Process(self._server.process.pid)}
        processes |= {f"rank, process {each.pid}": each for each in self._server.ranks()}
        for name, process in processes.items():
            with contextlib.suppress(psutil.Error):
                self.seen.memory.append((self.seen.ended, name, process.memory_info().rss))

    def _wrong(self, what: str) -> None:
        self.seen.problems.append(what)


def _different(requests: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Those requests whose pictures cannot be taken for one another, and the pictures that the pipeline makes alone."""
    sorts: list[dict[str, Any]] = []
    pictures: list[np.ndarray] = []
    for request, picture in zip(
        requests, alone([{**request, "use_resolution_binning": False} for request in requests]), strict=True
    ):
        if all(np.abs(picture - other).max() > 20 * APART for other in pictures):
            sorts.append(request)
            pictures.append(picture)
    assert len(sorts) >= 8, "too many requests give the same picture, so mixing them up could not be seen"
    return sorts, pictures


def growth(memory: list[tuple[int, str, int]], requests: int) -> dict[str, tuple[int, int]]:
    """Median resident bytes after half of the requests and after all, of processes that lived so long."""
    window = max(10, requests // 10)
    sizes: dict[str, tuple[int, int]] = {}
    for name in dict.fromkeys(name for _, name, _ in memory):
        mine = [(ended, size) for ended, one, size in memory if one == name]
        early = [size for ended, size in mine if requests // 2 <= ended <= requests // 2 + window]
        late = [size for ended, size in mine if ended >= requests - window]
        if early and late:
            sizes[name] = (round(statistics.median(early)), round(statistics.median(late)))
    return sizes


def run(soak: Soak, requests: int, kills: int, clients: int) -> None:
    """Have clients send everything, and kill ranks in the first half."""
    due = [requests // 2 * number // (kills + 1) for number in range(1, kills + 1)]
    with ThreadPoolExecutor(clients) as pool:
        working = [pool.submit(soak.client) for _ in range(clients)]
        while not all(each.done() for each in working):
            if due and soak.seen.ended >= due[0]:
                del due[0]
                soak.kill()
            time.sleep(0.05)
        for each in working:
            each.result()
    soak.seen.problems += [f"{len(due)} kills were not made"] if due else []


@click.command()
@click.option("--requests", default=1000, show_default=True)
@click.option("--kills", default=5, show_default=True, help="How often a rank is killed, in the first half.")
@click.option("--clients", default=6, show_default=True)
@click.option("--max_batch", default=4, show_default=True)
@click.option("--backend", default="auto", show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of compiled graphs; a new one by default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything that was measured.")
@click.option(
    "--recovery_s", default=15.0, show_default=True, help="A server has to be ready again in so many seconds."
)
def main(
    requests: int, kills: int, clients: int, max_batch: int, backend: str, seed: int, cache: Path | None,
    recovery_s: float, json_file: Path | None,
) -> None:  # fmt: skip
    """Load a server of two processes; exit with 1 where anything is not as it must be."""
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--ulysses_degree", "2", "--max_batch", str(max_batch), "--backend", backend, "--retry=1",
                 "--no_use_resolution_binning",
                 "--log_format", "json", "--cache_dir", str(cache or Path(folder) / "cache"))  # fmt: skip
        log = Path(folder) / "log"
        with serving(flags, log) as server:
            soak = Soak(server, requests, seed)
            begin = time.monotonic()
            with Watch(server) as watch:
                run(soak, requests, kills, clients)
            soak.finish(log)
        seen, took = soak.seen, time.monotonic() - begin
    for name, (early, late) in growth(seen.memory, requests).items():
        console.print(f"{name}: {early / 2**20:.1f} MB, then {late / 2**20:.1f} MB: {late / early - 1:+.1%}")
        if late > early * (1 + GROWTH):
            seen.problems.append(f"{name} grew from {early} to {late} bytes")
    seen.problems += [f"ready {each:.1f} s after a kill" for each in seen.recoveries if each > recovery_s]
    table = Table("what", "requests")
    for what, count in sorted(seen.counts.items()):
        table.add_row(what, str(count))
    console.print(table)
    console.print(f"{seen.ended} requests in {took:.0f} s; load average {os.getloadavg()[0]:.1f}")
    console.print("ready after kills, s: " + ", ".join(f"{each:.1f}" for each in seen.recoveries))
    console.print(f"/health, ms: median {1000 * statistics.median(watch.seconds):.1f}, "
                  f"greatest {1000 * max(watch.seconds):.1f} of {len(watch.seconds)}")  # fmt: skip
    for problem in seen.problems:
        console.print(f"WRONG: {problem}", markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps({**vars(seen), "seconds": took, "health": watch.seconds}))
    sys.exit(bool(seen.problems))


if __name__ == "__main__":
    main()
