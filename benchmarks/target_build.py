"""Seconds and megabytes of graphs for a GPU that is not there: FLUX at its published size, every rank of a plan.

What `xdit-compile build --target` does, but for the pipeline around the denoiser: the model is on meta tensors. Each
rank is captured, split and compiled in turn; what ranks share is compiled for the first that wants it. Then everything
is loaded in this process as on a machine with the card, short of running it, and Triton is asked for no compilation.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from typing import Any
from unittest import mock

import click
import torch
from capture import flux
from denoiser import Size
from gpu_count import SMALL
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile import Plan
from xdit_compile.backends.artifact import Artifact, loaded
from xdit_compile.backends.folders.build_folder import BuildFolder
from xdit_compile.backends.target import card_code
from xdit_compile.backends.target.cards import CARDS
from xdit_compile.backends.target.pretend_card import pretend_card
from xdit_compile.cache.store import Store
from xdit_compile.runtime.methods.ahead import build_ahead


@dataclasses.dataclass(frozen=True)
class Built:
    """What a rank added: seconds, those of the processor, compiled structures with their Triton kernels, bytes."""

    seconds: float
    processor: float
    structures: int
    kernels: int
    code: int
    programs: int


@dataclasses.dataclass(frozen=True)
class Loaded:
    """All structures in a process that has none: seconds, kernels that Triton found and that it compiled."""

    seconds: float
    found: int
    compiled: int


def build(model: nn.Module, call: dict[str, Any], plan: Plan, target: str, store: Store) -> list[Built]:
    """Build for every rank."""
    built, known, begin = list[Built](), set[str](), _now()

    def note(rank: int) -> None:
        nonlocal begin
        seconds, processor = (now - before for now, before in zip(_now(), begin, strict=True))
        entries = [each for each in store.listed() if each.name not in known]
        known.update(each.name for each in entries)
        code = [each for each in entries if each.kind == "code"]
        kernels = sum(len(artifact.card.kernels) for each in code if (artifact := _artifact(store, each.name)).card)
        sizes = (sum(each.size for each in entries if each.kind == kind) for kind in ("code", "program"))
        built.append(Built(seconds, processor, len(code), kernels, *sizes))
        begin = _now()

    build_ahead(model, "transformer", (), call, plan, store, note, CARDS[target])
    return built


def load(store: Store, target: str) -> Loaded:
    """Load all code, and see that Triton had nothing to compile."""
    artifacts = [_artifact(store, each.name) for each in store.listed() if each.kind == "code"]
    folder, looked, noting = BuildFolder(), dict[str, bool](), card_code.noting_kernels

    def both(note: Any) -> Any:
        return noting(lambda path, known: (note(path, known), looked.setdefault(path.name, known)))

    with pretend_card(CARDS[target]), mock.patch.object(card_code, "noting_kernels", both):
        begin = time.perf_counter()
        for artifact in artifacts:
            loaded(artifact, folder)
        seconds = time.perf_counter() - begin
    return Loaded(seconds, sum(looked.values()), len(looked) - sum(looked.values()))


def _now() -> tuple[float, float]:
    """The time, and how long processors worked for this process and those that it waited for, in seconds."""
    return time.perf_counter(), sum(os.times()[:4])


def _artifact(store: Store, name: str) -> Artifact:
    entry = store.read("code", name)
    assert entry is not None
    return Artifact.unpacked(entry.body)


def table_of(built: list[Built], title: str) -> Table:
    """A row for each rank, and one for all."""
    table = Table("rank", title=title, title_justify="left")
    for column in ("seconds", "CPU seconds", "structures compiled", "Triton kernels", "MB of code", "MB of programs"):
        table.add_column(column, justify="right")
    rows = [*built, Built(*(sum(getattr(each, field.name) for each in built) for field in dataclasses.fields(Built)))]
    for rank, row in enumerate(rows):
        name = "all" if rank == len(built) else str(rank)
        sizes = (f"{size / 1e6:.2f}" for size in (row.code, row.programs))
        table.add_row(
            name,
            f"{row.seconds:.1f}",
            f"{row.processor:.1f}",
            str(row.structures),
            str(row.kernels),
            *sizes,
            end_section=rank == len(built) - 1,
        )
    return table


def denoiser(double: int, single: int, small: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model in bfloat16 without weights, and one call of it."""
    if small:
        size = Size(blocks=2, **SMALL)
        with torch.device("meta"):
            model, call = size.build(), size.inputs()
    else:
        model, call = flux(double, single)
    half = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta", torch.bfloat16), call)
    return nn.Module.to(model, torch.bfloat16), half


@click.command()
@click.option("--double", default=19, show_default=True, help="Double blocks.")
@click.option("--single", default=38, show_default=True, help="Single blocks.")
@click.option("--small", is_flag=True, help="128 hidden and 64 + 16 tokens in place of 3,072 and 4,096 + 512.")
@click.option("--ulysses", default=8, show_default=True)
@click.option("--target", type=click.Choice(list(CARDS)), default="sm_90", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    double: int, single: int, small: bool, ulysses: int, target: str, json_file: pathlib.Path | None
) -> None:  # fmt: skip
    """Build graphs of all ranks for a card that is not there."""
    torch.set_num_threads(1)
    before = os.getloadavg()
    plan = Plan(ulysses=ulysses, backend="inductor").check()
    model, call = denoiser(double, single, small)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(pathlib.Path(folder) / "cache")
        built = build(model, call, plan, target, store)
        found = load(store, target)
    sizes = "small" if small else f"FLUX.1-dev, {double} + {single} blocks"
    console = Console()
    console.print(table_of(built, f"{sizes}, ulysses {ulysses}, for {target}; no GPU, one thread"))
    console.print(f"loaded again in {found.seconds:.1f} s: {found.found} kernels found, {found.compiled} compiled")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    console.print(f"most memory of the process {memory:,.0f} MiB; load average {before[0]:.2f} at the beginning")
    if json_file:
        about = {
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("torch", "triton", "diffusers")}
            | {"python": platform.python_version()},
            "cores": os.cpu_count(),
            "load_average": before,
            "target": target,
            "ulysses": ulysses,
            "memory_mib": memory,
        }
        rows = {"ranks": [dataclasses.asdict(each) for each in built], "loaded": dataclasses.asdict(found)}
        json_file.write_text(json.dumps({**about, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
