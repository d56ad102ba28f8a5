"""Pictures per minute that a server makes for several clients, with joined calls and without, and what it adds to one.

Every server is a real one: ``xdit-compile serve`` with two processes, the embedded model, HTTP over the loopback. The
servers are loaded in turns. Before anything is timed each one's pictures are compared with those that the pipeline
makes alone, which are 1 of 255 apart at most.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from xdit_compile.cli.options.request import DEMO_PIPELINE

SERVERS = {
    "ulysses 2, --max_batch 1": ("--ulysses_degree", "2", "--max_batch", "1"),
    "ulysses 2, --max_batch 8": ("--ulysses_degree", "2", "--max_batch", "8"),
    "data 2, --max_batch 8": ("--data_parallel_degree", "2", "--max_batch", "8"),
}
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "orange", "purple")
READY_S = 600


@contextlib.contextmanager
def server(flags: tuple[str, ...]) -> Iterator[str]:
    """The address of a server, which ends with the context."""
    command = [sys.executable, "-m", "xdit_compile", "serve", "--port", "0", "--nproc", "2", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+?(?=;)", process.stdout.readline())
        assert found is not None, "the server said no address"
        limit = time.monotonic() + READY_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{found[0]}/health/ready") as answer:
                if answer.status == 200:
                    break
            if time.monotonic() > limit:
                raise TimeoutError("the server was not ready in time")
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


def asked(address: str, prompt: str, seed: int, steps: int) -> tuple[np.ndarray, float]:
    """A picture, uint8 ``[H, W, 3]``, and the seconds until it was here."""
    body = {"prompt": prompt, "seed": seed, "num_inference_steps": steps}
    request = urllib.request.Request(
        f"{address}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        data = json.load(answer)["data"][0]["b64_json"]
    seconds = time.perf_counter() - begin
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")), seconds


def alone(seeds: range, steps: int) -> list[np.ndarray]:
    """What the pipeline makes of each request without a server, on one process."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(DEMO_PIPELINE))
    pipe.set_progress_bar_config(disable=True)
    made = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(seed)
        result = pipe(prompt(seed), num_inference_steps=steps, generator=generator, output_type="np")
        made.append((result.images[0] * 255).round().astype(np.uint8))
    return made


def prompt(seed: int) -> str:
    """What to show."""
    return f"a {COLOURS[seed % len(COLOURS)]} circle"


def load(address: str, clients: int, each: int, steps: int) -> float:
    """Pictures per minute with so many clients, each of which asks for its next picture when it has one."""
    barrier = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        barrier.wait()
        for index in range(each):
            asked(address, prompt(number + index), number * each + index, steps)

    with ThreadPoolExecutor(clients) as pool:
        done = [pool.submit(client, number) for number in range(clients)]
        barrier.wait()
        begin = time.perf_counter()
        for one in done:
            one.result()
    return 60 * clients * each / (time.perf_counter() - begin)


def added(address: str, steps: int, count: int) -> tuple[float, float]:
    """Median seconds of a lone request as its client sees it, and of what its ranks spent on it."""

    def spent() -> float:
        with urllib.request.urlopen(f"{address}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        phases = [line for line in lines if line.startswith('xdit_phase_seconds_total{phase="')]
        return sum(float(line.rpartition(" ")[2]) for line in phases if "encode" not in line)

    seen, inside = [], []
    for seed in range(count):
        before = spent()
        seen.append(asked(address, prompt(seed), seed, steps)[1])
        inside.append(spent() - before)
    return statistics.median(seen), statistics.median(inside)


@click.command()
@click.option("--rounds", default=3, show_default=True, help="How often each server is loaded; they take turns.")
@click.option("--clients", default=8, show_default=True)
@click.option("--each", default=3, show_default=True, help="Pictures that each client asks for in a round.")
@click.option("--steps", default=20, show_default=True)
def main(rounds: int, clients: int, each: int, steps: int) -> None:
    """Compare servers of two processes under the load of several clients."""
    console, seeds = Console(), range(clients)
    expected = alone(seeds, steps)
    with contextlib.ExitStack() as stack:
        addresses = {name: stack.enter_context(server(flags)) for name, flags in SERVERS.items()}
        for name, address in addresses.items():
            load(address, clients, 1, steps)
            with ThreadPoolExecutor(clients) as pool:
                made = list(pool.map(lambda seed, to=address: asked(to, prompt(seed), seed, steps)[0], seeds))
            apart = max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(made, expected, strict=True))
            console.print(f"{name}: {apart} of 255 from the pipeline alone")
            assert apart <= 1, "the server's pictures are others"
        rates: dict[str, list[float]] = {name: [] for name in addresses}
        for _ in range(rounds):
            for name, address in addresses.items():
                rates[name].append(load(address, clients, each, steps))
        lone = {name: added(address, steps, 9) for name, address in addresses.items()}
    base = statistics.median(next(iter(rates.values())))
    table = Table("server", "pictures a minute", "ratio", "lone request, s", "ranks' part, s", "added, ms")
    for name, found in rates.items():
        rate, (seen, inside) = statistics.median(found), lone[name]
        table.add_row(
            name, f"{rate:.1f}", f"{rate / base:.2f}", f"{seen:.3f}", f"{inside:.3f}", f"{1000 * (seen - inside):.1f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
