"""What Ray adds to a server: seconds of a lone request beside one without Ray, and what killed actors cost.

Both servers are real ones of two ranks with the embedded model, HTTP over the loopback; the requests to them take
turns. Before anything is timed their pictures are compared with those that the pipeline makes alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from serving_client import Server, alone, processes, serving

PLAIN, RAY = "serve", "serve --ray"
COMMON = ("--ulysses_degree", "2", "--retry", "2")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
ACTOR, GANG = "ray::RankActor", "ray::ServeReplica:xdit-compile:Gang"


def asked(seed: int, steps: int) -> dict[str, Any]:
    """What a client sends."""
    return {"prompt": f"a {COLOURS[seed % len(COLOURS)]} circle", "seed": seed, "num_inference_steps": steps}


def check(server: Server, expected: list[np.ndarray], steps: int) -> int:
    """How far the pictures of a server are from those expected, of 255; refused where that is more than 1."""
    apart = max(
        int(np.abs(server.picture(**asked(seed, steps)) - picture).max()) for seed, picture in enumerate(expected)
    )
    assert apart <= 1, f"pictures are {apart} of 255 from those of the pipeline alone"
    return apart


def warm(server: Server, most: int) -> None:
    """Have every number of calls that may wait at the same time compiled."""
    for count in range(1, most + 1):
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda seed: server.ask(**asked(seed, 5)), range(count)))


def in_turns(servers: dict[str, Server], count: int, steps: int) -> dict[str, list[float]]:
    """Seconds of lone requests, by server."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for number in track(range(count), "lone requests"):
        names = list(servers) if number % 2 else list(servers)[::-1]
        for name in names:
            seconds[name].append(servers[name].ask(**asked(number, steps)).seconds)
    return seconds


def recovery(server: Server, word: str, steps: int, clients: int) -> tuple[float, int]:
    """Seconds from a kill, while requests are at work, until a request has been answered that came after it.

    Returns:
        Those, and how many of the requests that were at work were lost.
    """
    with ThreadPoolExecutor(clients + 1) as pool:
        waiting = [pool.submit(server.ask, **asked(seed, 10 * steps)) for seed in range(clients)]
        time.sleep(1.0)
        processes(word)[0].kill()
        begin = time.monotonic()
        later = server.ask(**{**asked(99, 1), "priority": 100})
        seconds = time.monotonic() - begin
        statuses = [each.result().status for each in waiting] + [later.status]
    return seconds, sum(status != 200 for status in statuses)


@click.command()
@click.option("--count", default=40, show_default=True, help="Lone requests to each server.")
@click.option("--steps", default=8, show_default=True)
@click.option("--kills", default=5, show_default=True, help="How often an actor, and then a gang, is killed.")
@click.option("--clients", default=3, show_default=True, help="Requests that are at work then.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write everything that was measured.")
def main(count: int, steps: int, kills: int, clients: int, json_file: Path | None) -> None:
    """Compare a service on Ray with a server without."""
    console = Console(width=120)
    expected = alone([asked(seed, steps) for seed in range(4)])
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = (*COMMON, "--cache_dir", str(folder / "cache"))
        servers = {}
        for name, more in ((PLAIN, ()), (RAY, ("--ray",))):
            servers[name] = stack.enter_context(serving((*flags, *more), folder / name.replace(" ", "")))
            apart = check(servers[name], expected, steps)
            console.print(f"{name}: pictures at most {apart} of 255 from those of the pipeline alone")
        seconds = in_turns(servers, count, steps)
        warm(servers[RAY], clients + 1)
        lost = {word: [recovery(servers[RAY], word, steps, clients) for _ in track(range(kills), word)]
                for word in (ACTOR, GANG)}  # fmt: skip
    _show(console, seconds, lost)
    if json_file is not None:
        json_file.write_text(json.dumps({"seconds": seconds, "lost": lost}, indent=1))


def _show(console: Console, seconds: dict[str, list[float]], lost: dict[str, list[tuple[float, int]]]) -> None:
    table = Table("server", "lone request, s: median", "added, ms: median", "added, ms: 9 of 10 below")
    differences = sorted(1000 * (ray - plain) for ray, plain in zip(seconds[RAY], seconds[PLAIN], strict=True))
    table.add_row(PLAIN, f"{statistics.median(seconds[PLAIN]):.3f}", "", "")
    table.add_row(
        RAY, f"{statistics.median(seconds[RAY]):.3f}", f"{statistics.median(differences):.1f}",
        f"{differences[int(0.9 * (len(differences) - 1))]:.1f}",
    )  # fmt: skip
    console.print(table)
    table = Table("killed", "times", "answer after it, s: median", "greatest", "requests lost")
    for word, name in ((ACTOR, "an actor"), (GANG, "a gang's replica")):
        after = [each for each, _ in lost[word]]
        table.add_row(
            name, str(len(after)), f"{statistics.median(after):.1f}", f"{max(after):.1f}",
            str(sum(number for _, number in lost[word])),
        )  # fmt: skip
    console.print(table)
    console.print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
