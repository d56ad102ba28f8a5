"""What a server makes of two processes: pictures per minute, what it adds to one request, and how soon it listens.

Every server is a real one: ``xdit-compile serve`` with two processes, the embedded model, HTTP over the loopback. The
servers are loaded in turns. Before anything is timed each one's pictures are compared with those that the pipeline
makes alone, which are 1 of 255 apart at most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from serving_client import ANSWER_S, READY_S, Server, Watch, alone, called, serving

from xdit_compile.cli.options.request import DEMO_PIPELINE

BASE = "ulysses 2, --max_batch 1"
SERVERS = {
    BASE: ("--ulysses_degree", "2", "--max_batch", "1"),
    "ulysses 2, --max_batch 8": ("--ulysses_degree", "2", "--max_batch", "8"),
    "data 2, --max_batch 8": ("--data_parallel_degree", "2", "--max_batch", "8"),
    "throughput=replicas:2, --max_batch 1": (
        "--plan", "latency=ulysses:2", "--plan", "throughput=replicas:2", "--max_batch", "1",
    ),
    "throughput=replicas:2, --max_batch 8": (
        "--plan", "latency=ulysses:2", "--plan", "throughput=replicas:2", "--max_batch", "8",
    ),
}  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")


def asked(seed: int, steps: int) -> dict[str, Any]:
    """What a client sends."""
    return {"prompt": f"a {COLOURS[seed % len(COLOURS)]} circle", "seed": seed, "num_inference_steps": steps}


class Direct:
    """The pipeline under ulysses in two processes like those of a server, which call it when they are told."""

    def __init__(self, cache: Path):
        from xdit_compile.cli.processes.launch import settings_of

        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pairs = [context.Pipe() for _ in range(2)]
        self._ends = [mine for mine, _ in pairs]
        os.environ.update(settings_of(2))
        self._members = [
            context.Process(target=_call_when_told, args=(theirs, rank, port, cache), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for member in self._members:
            member.start()

    def seconds(self, request: dict[str, Any]) -> float:
        """That a call of the pipeline takes, on rank 0."""
        for each in self._ends:
            each.send(request)
        return [each.recv() for each in self._ends][0]

    def end(self) -> None:
        """Have the processes end."""
        for each in self._ends:
            each.send(None)
        for member in self._members:
            member.join(60)


def _call_when_told(told: Connection, rank: int, port: int, cache: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    from diffusers import DiffusionPipeline

    from xdit_compile import Plan, parallelize

    pipe = parallelize(DiffusionPipeline.from_pretrained(str(DEMO_PIPELINE)), Plan(ulysses=2, cache=str(cache)))
    pipe.set_progress_bar_config(disable=True)
    while (request := told.recv()) is not None:
        begin = time.perf_counter()
        called(pipe, request)
        told.send(time.perf_counter() - begin)


def load(server: Server, clients: int, each: int, steps: int) -> float:
    """Pictures per minute with so many clients, each of which asks for its next picture when it has one."""
    barrier = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        barrier.wait()
        for index in range(each):
            server.picture(**asked(number * each + index, steps))

    with ThreadPoolExecutor(clients) as pool:
        done = [pool.submit(client, number) for number in range(clients)]
        barrier.wait()
        begin = time.perf_counter()
        for one in done:
            one.result()
    return 60 * clients * each / (time.perf_counter() - begin)


def warm(server: Server, clients: int) -> None:
    """Have every number of calls that may wait at the same time compiled."""
    for count in range(1, clients + 1):
        load(server, count, 1, 5)


def added(server: Server, direct: Direct, steps: int, count: int) -> tuple[float, float]:
    """Median seconds of a lone request, and of how much longer it took than the call that was made just before."""
    seen, more = [], []
    for seed in range(-2, count):
        called = direct.seconds(asked(abs(seed), steps))
        answered = server.ask(**asked(abs(seed), steps)).seconds
        if seed >= 0:
            seen.append(answered)
            more.append(answered - called)
    return statistics.median(seen), statistics.median(more)


def steps_after_cancelling(server: Server, id: str) -> int:
    """Steps that a request makes after its client was told that it is given up."""
    steps, begun = [0], threading.Event()

    def follow() -> None:
        for event in server.events(**asked(1, 500), id=id):
            if event.get("type", "").endswith("progress"):
                steps.append(event["step"])
                if event["step"] >= 5:
                    begun.set()

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        assert begun.wait(ANSWER_S), "the request made no steps"
        before = steps[-1]
        assert server.cancel(id) == 200
        following.result()
    return steps[-1] - before


def recovery(server: Server) -> tuple[float, float]:
    """Seconds from a rank's SIGKILL until the server is ready, and until it has answered one more request."""
    server.ranks()[1].kill()
    begin = time.monotonic()
    while server.get("/health/ready")[0] == 200:
        assert time.monotonic() - begin < READY_S, "the loss of a rank was not seen"
    server.wait_ready()
    ready = time.monotonic() - begin
    server.picture(**asked(1, 8))
    return ready, time.monotonic() - begin


@dataclasses.dataclass
class Figures:
    """Of one server."""

    rates: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)
    health: list[float] = dataclasses.field(default_factory=list)
    seen: float = 0.0
    more: float = 0.0
    cancelled: list[int] = dataclasses.field(default_factory=list)
    recovered: list[tuple[float, float]] = dataclasses.field(default_factory=list)


def check(server: Server, name: str, expected: list[np.ndarray], requests: list[dict[str, Any]]) -> str:
    """Compare the pictures that several clients get at the same time; says how far they are apart."""
    with ThreadPoolExecutor(len(requests)) as pool:
        made = list(pool.map(lambda request: server.picture(**request), requests))
    apart = max(int(np.abs(a - b).max()) for a, b in zip(made, expected, strict=True))
    assert apart <= 1, f"{name}: pictures are {apart} of 255 from those of the pipeline alone"
    return f"{name}: pictures at most {apart} of 255 from those of the pipeline alone"


@click.command()
@click.option("--rounds", default=3, show_default=True, help="How often each server is loaded; they take turns.")
@click.option("--clients", default=8, show_default=True)
@click.option("--each", default=3, show_default=True, help="Pictures that each client asks for in a round.")
@click.option("--steps", default=20, show_default=True)
@click.option("--kills", default=3, show_default=True, help="How often a rank of each server is killed.")
@click.option("--only", multiple=True, help="Servers that have this in their name; the first one always.")
@click.option("--cache", type=click.Path(path_type=Path), help="Folder of compiled graphs; a new one by default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything that was measured.")
def main(
    rounds: int, clients: int, each: int, steps: int, kills: int, only: tuple[str, ...], cache: Path | None,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Compare servers of two processes under the load of several clients."""
    console, requests = Console(width=140), [asked(seed, steps) for seed in range(clients)]
    chosen = {name: f for name, f in SERVERS.items() if name == BASE or not only or any(o in name for o in only)}
    expected, figures = alone(requests), {name: Figures() for name in chosen}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache = cache or folder / "cache"
        direct = Direct(cache)
        stack.callback(direct.end)
        servers = {}
        for number, (name, flags) in enumerate(chosen.items()):
            servers[name] = stack.enter_context(serving((*flags, "--cache_dir", str(cache)), folder / str(number)))
            warm(servers[name], clients)
            console.print(check(servers[name], name, expected, requests))
        for round in range(rounds):
            for name, server in servers.items():
                used = server.processor_seconds()
                with Watch(server) as watch:
                    figures[name].rates.append(load(server, clients, each, steps))
                figures[name].processor.append((server.processor_seconds() - used) / (clients * each))
                figures[name].health += watch.seconds
                figures[name].cancelled.append(steps_after_cancelling(server, f"cancelled-{round}"))
            rates = [f"{figures[name].rates[-1]:.1f}" for name in servers]
            console.print(f"pictures a minute: {', '.join(rates)}; load average {os.getloadavg()[0]:.1f}")
        for name, server in servers.items():
            figures[name].seen, figures[name].more = added(server, direct, steps, 7)
            console.print(f"{name}: {1000 * figures[name].more:.0f} ms added to {figures[name].seen:.3f} s")
        for name, server in servers.items():
            with Watch(server) as watch:
                figures[name].recovered = [recovery(server) for _ in range(kills)]
            figures[name].health += watch.seconds
    _show(console, figures)
    if json_file is not None:
        json_file.write_text(json.dumps({name: dataclasses.asdict(each) for name, each in figures.items()}, indent=1))


def _show(console: Console, figures: dict[str, Figures]) -> None:
    table = Table(
        "server", "pictures a minute", "ratio", "processor s of a picture", "lone request, s", "added, ms",
        "steps after cancelling",
        "/health, ms: median, greatest", "ready after a kill, s", "answer after a kill, s",
    )  # fmt: skip
    for name, each in figures.items():
        ratios = [rate / base for rate, base in zip(each.rates, figures[BASE].rates, strict=True)]
        ready, answer = (max((both[i] for both in each.recovered), default=float("nan")) for i in (0, 1))
        table.add_row(
            name, f"{statistics.median(each.rates):.1f}", f"{statistics.median(ratios):.2f}",
            f"{statistics.median(each.processor):.2f}", f"{each.seen:.3f}",
            f"{1000 * each.more:.1f}", str(max(each.cancelled)),
            f"{1000 * statistics.median(each.health):.1f}, {1000 * max(each.health):.1f}",
            f"{ready:.1f}", f"{answer:.1f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
