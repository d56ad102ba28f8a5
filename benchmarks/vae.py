"""Decoding with the autoencoder of Stable Diffusion: memory and time of ways to split it.

Memory is counted twice. From the graph: what tensors are alive at one time when operators run one by one, for sizes
that nothing here could hold. And on processes: by how much one decode raises what the kernel counts for each.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import click
import torch
from autoencoder import CONFIG, SCALE, Picture
from comparison import compare
from contenders import vae
from diffusers import AutoencoderKL
from distvae_peak import distvae_peak
from processes import Setting, Team
from resident import EXACT
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from xdit_compile import Plan
from xdit_compile.compiler import Analysis, analyse, place
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.peak_memory import peak_bytes
from xdit_compile.passes.choose.rows import choose_rows
from xdit_compile.passes.memory.on_meta import peak_of
from xdit_compile.passes.memory.tile_rows import cut_into

MEBI, GIBI = 2**20, 2**30
RANKS = (1, 2, 4, 8)
STRIPS = 16
BUDGETS = (24, 48, 80)
LARGEST = 10_240
COUNTED = 256
"""Pixels at which distvae's memory is counted."""
STEP = 256
"""Pixels between the sides that are tried."""


@dataclasses.dataclass(frozen=True)
class Peak:
    """Activations of the fullest rank, and what it sends for one picture, in bytes."""

    name: str
    ranks: int
    bytes: int
    sent: int = 0


def plain_peak(side: int, tiled: bool = False) -> int:
    """Activations of diffusers' own decode."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = AutoencoderKL(**CONFIG).eval()
        if tiled:
            module.enable_tiling()
        return peak_bytes(module.decode, torch.empty(1, 4, side // SCALE, side // SCALE), return_dict=False)


def split_peak(side: int, ranks: int, strips: int = 1) -> Peak:
    """Activations and traffic of a decode split by rows, without the gathering of the picture."""
    plan = Plan(ring=ranks, vae="patch", vae_memory="1MiB" if strips > 1 else None)
    analysis = analysed(side, plan)
    found = []
    for rank in {0, ranks // 2, ranks - 1}:
        part = place(analysis, plan, Mesh.simulated(plan, rank), gather=False)
        program = cut_into(part.program, strips, 0) if strips > 1 else part.program
        found.append((peak_of(program), sum(collective.bytes for collective in part.ledger.collectives)))
    name = "patch" if strips == 1 else f"patch, {strips} strips"
    return Peak(name, ranks, max(peak for peak, _ in found), max(sent for _, sent in found))


def analysed(side: int, plan: Plan) -> Analysis:
    """The decode's graph, from shapes alone."""
    with torch.device("meta"):
        module = AutoencoderKL(**CONFIG).eval()

    def decode(z: torch.Tensor) -> torch.Tensor:
        return module.decode(z, return_dict=False)[0]

    latent = Picture(side).latent("meta")
    return analyse(module, plan, (latent,), {}, forward=decode, choose=choose_rows, run=False)


def computed(side: int) -> list[Peak]:
    """Every way at one size, from the graph."""
    found = [Peak("diffusers", 1, plain_peak(side)), Peak("diffusers, tiled", 1, plain_peak(side, tiled=True))]
    for strips in (1, STRIPS):
        found += [split_peak(side, ranks, strips) for ranks in track(RANKS, "counting", transient=True)]
    found += [Peak("distvae", ranks, theirs(side, ranks)) for ranks in RANKS[1:]]
    return found


@functools.cache
def _counted(ranks: int) -> int:
    return distvae_peak(COUNTED, ranks)


def theirs(side: int, ranks: int) -> int:
    """Activations of distvae: counted at ``COUNTED`` pixels, and taken to grow with the picture."""
    return _counted(ranks) * side**2 // COUNTED**2


def largest(budget: int, peak: Callable[[int], int]) -> int:
    """The greatest side, up to ``LARGEST``, whose activations fit beside the weights."""
    with torch.device("meta"):
        weights = sum(parameter.numel() * 4 for parameter in AutoencoderKL(**CONFIG).parameters())

    def fits(steps: int) -> bool:
        return peak(steps * STEP) + weights <= budget

    most = LARGEST // STEP
    if fits(most):
        return LARGEST
    steps = min(int(math.sqrt((budget - weights) / peak(4 * STEP)) * 4), most)
    while steps and not fits(steps):
        steps -= 1
    while steps < most and fits(steps + 1):
        steps += 1
    return steps * STEP


def measured(side: int, backend: str) -> list[tuple[str, int, int]]:
    """By how much a decode raises the memory of the fullest process: name, processes, bytes."""
    found = []
    setting = Setting(Picture(side), backend, suite="vae")
    wanted = vae(backend)
    for count in sorted({entry.processes for entry in wanted}):
        team = Team(count, setting, EXACT)
        try:
            for entry in wanted:
                if entry.processes == count:
                    team.prepare(entry.name)
                    found.append((entry.name, count, team.peak(entry.name)))
        finally:
            team.close()
    return found


@click.command()
@click.option("--side", default=256, show_default=True, help="Pixels of the picture that is decoded.")
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="eager", show_default=True)
@click.option("--rounds", default=7, show_default=True, help="Decodes of each contender; all take one in each round.")
@click.option("--computed_side", default=1024, show_default=True, help="Pixels of the picture of the counted table.")
@click.option("--only", type=click.Choice(["graph", "processes", "time"]), help="One part alone.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    side: int, backend: str, rounds: int, computed_side: int, only: str | None, json_file: pathlib.Path | None
) -> None:
    """Compare ways to decode: memory from the graph and on processes, largest sides, seconds."""
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    try:
        setting = Setting(Picture(side), backend, suite="vae")
        Picture(computed_side)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    report: dict[str, Any] = {}
    if only in (None, "graph"):
        report |= _graph(computed_side, console)
    if only in (None, "processes"):
        report |= _processes(side, backend, console)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if only in (None, "time"):
        wanted = [entry for entry in vae(backend) if entry.processes <= 2]
        timed = json_file.with_suffix(".time.json") if json_file else None
        compare(wanted, wanted[0].name, setting, rounds, json_file=timed)


def _graph(side: int, console: Console) -> dict[str, Any]:
    peaks = computed(side)
    base = peaks[0].bytes
    table = Table(
        "way", title=f"activations counted from the graph, {side} x {side} pixels, fp32", title_justify="left"
    )
    for column in ("ranks", "MiB a rank", "times ranks, of diffusers' own", "MiB sent a rank"):
        table.add_column(column, justify="right")
    for peak in peaks:
        share = f"{peak.bytes * peak.ranks / base:.3f}"
        table.add_row(peak.name, str(peak.ranks), f"{peak.bytes / MEBI:.1f}", share, f"{peak.sent / MEBI:.1f}")
    console.print(table)
    ways: dict[str, Callable[[int], int]] = {
        "diffusers": plain_peak,
        "diffusers, tiled": lambda side: plain_peak(side, tiled=True),
    }
    for strips in (1, STRIPS):
        for ranks in RANKS:
            name = f"patch {ranks}" + (f", {strips} strips" if strips > 1 else "")
            ways[name] = lambda side, ranks=ranks, strips=strips: split_peak(side, ranks, strips).bytes
    for ranks in RANKS[1:]:
        ways[f"distvae {ranks}"] = lambda side, ranks=ranks: theirs(side, ranks)
    ways = {name: functools.cache(peak) for name, peak in ways.items()}
    sides = {
        name: [largest(budget * GIBI, peak) for budget in BUDGETS]
        for name, peak in track(ways.items(), "looking for the largest sides", transient=True)
    }
    table = Table("way", title=f"largest side in pixels, weights beside it, up to {LARGEST}", title_justify="left")
    for budget in BUDGETS:
        table.add_column(f"{budget} GiB", justify="right")
    for name, found in sides.items():
        table.add_row(name, *map(str, found))
    console.print(table)
    return {"side": side, "computed": [dataclasses.asdict(peak) for peak in peaks], "largest": sides}


def _processes(side: int, backend: str, console: Console) -> dict[str, Any]:
    found = measured(side, backend)
    base = found[0][2]
    table = Table(
        "way", title=f"memory that one decode adds to a process, {side} x {side} pixels", title_justify="left"
    )
    for column in ("processes", "MiB of the fullest", "times processes, of diffusers' own"):
        table.add_column(column, justify="right")
    for name, count, size in found:
        table.add_row(name, str(count), f"{size / MEBI:.1f}", f"{size * count / base:.3f}")
    console.print(table)
    return {"measured_side": side, "measured": found}


if __name__ == "__main__":
    main()
