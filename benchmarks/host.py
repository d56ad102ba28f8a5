"""Host milliseconds that a known call spends before its first operator, by part, on two ranks and without the model.

The inputs have the sizes of published models; the latents and the time of every call are new, as a scheduler makes
them, and the rest stays the same tensor.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import multiprocessing
import pathlib
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from xdit_compile.backends.eager import Eager
from xdit_compile.mesh import Mesh
from xdit_compile.plan import Plan
from xdit_compile.session import Session
from xdit_compile.signature import signature

LIMIT_S = 60
PARTS = ("entering and leaving", "replacing shared inputs", "announcing and comparing")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Shapes of one call: those of new tensors in every call, those that stay, and the depth of the module tree."""

    name: str
    new: tuple[tuple[int, ...], ...]
    same: tuple[tuple[int, ...], ...]
    modules: int


SIZES = (
    Inputs("tiny", ((1, 16, 16), (1,)), ((1, 8, 32), (1, 32)), 30),
    Inputs("FLUX.1 1024²", ((1, 4096, 64), (1,)), ((1, 512, 4096), (1, 768), (512, 3), (4096, 3), (1,)), 1300),
    Inputs("SDXL 1024²", ((2, 4, 128, 128), ()), ((2, 77, 2048), (2, 1280), (2, 6)), 2500),
    Inputs("Wan 2.1 720p, 81 frames", ((1, 16, 21, 90, 160), (1,)), ((1, 512, 4096),), 1000),
    Inputs("a video of 1 million tokens", ((1, 1_000_000, 64), (1,)), ((1, 512, 4096),), 1000),
)


def measure(rank: int, port: int, rounds: int, end: Connection) -> None:
    """What one rank spends: for each size a list of milliseconds by part, and those of the signature beside them."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=LIMIT_S)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=limit)
    plan = Plan(ulysses=2, backend="eager", timeout_s=LIMIT_S)
    session = Session(plan, Mesh.from_process_group(plan), Eager())
    end.send({size.name: _of_size(session, size, rounds) for size in SIZES})
    session.close()
    dist.barrier()
    dist.destroy_process_group()


def _of_size(session: Session, size: Inputs, rounds: int) -> dict[str, list[float]]:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(size.modules))).eval()
    same = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in size.same]
    held = [torch.ones(shape) for shape in size.new]
    found: dict[str, list[float]] = {part: [] for part in (*PARTS, "signature")}
    with session.request({}):
        gc.disable()
        for _ in range(rounds):
            new = [tensor.view(tensor.shape) for tensor in held]
            dist.barrier()
            _one_call(session, module, [*new, *same], found)
        gc.enable()
    return found


def _one_call(session: Session, module: nn.Module, leaves: list[Any], found: dict[str, list[float]]) -> None:
    def timed(part: str, do: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = do()
        found[part].append(1e3 * (time.perf_counter() - begin))
        return result

    timed("signature", lambda: signature(module, tuple(leaves), {}))
    around = session.call()
    begin = time.perf_counter()
    around.__enter__()
    entered = time.perf_counter() - begin
    leaves = timed(PARTS[1], lambda: session.inputs.known(leaves))
    timed(PARTS[2], lambda: session.announce("module 0", leaves))
    begin = time.perf_counter()
    around.__exit__(None, None, None)
    found[PARTS[0]].append(1e3 * (entered + time.perf_counter() - begin))


@click.command()
@click.option("--rounds", default=200, show_default=True, help="Calls of each size.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(rounds: int, json_file: pathlib.Path | None) -> None:
    """Measure what agreeing on every call costs, beside the signature of the module tree."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    ranks = [context.Process(target=measure, args=(rank, port, rounds, pairs[rank][1])) for rank in range(2)]
    for each in ranks:
        each.start()
    found = [mine.recv() for mine, _ in pairs]
    for each in ranks:
        each.join(LIMIT_S)
    table = Table("inputs", *PARTS, "agreeing, in all", "signature of the tree", title="median ms a call, rank 0")
    for size in SIZES:
        each = found[0][size.name]
        total = statistics.median(sum(parts) for parts in zip(*(each[part] for part in PARTS), strict=True))
        cells = [statistics.median(each[part]) for part in PARTS]
        row = [*cells, total, statistics.median(each["signature"])]
        table.add_row(size.name, *(f"{value:.3f}" for value in row))
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
