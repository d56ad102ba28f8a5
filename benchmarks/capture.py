"""Seconds from a full-size denoiser without weights to the graphs that each rank runs, phase by phase.

The model is FLUX at its published size (19 double and 38 single blocks, 1024 x 1024 pixels, 512 text tokens) on meta
tensors: nothing is computed, so what is measured is the compiler alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import click
import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import nn

from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import Analysis, place
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Program
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.rules.registry import rulebook

PHASES = ("capture", "infer axes", "choose what to split", "partition, one rank")
SIDE, TEXT = 64, 512


@dataclasses.dataclass(frozen=True)
class Found:
    """One pass through the compiler: seconds by phase, and the size of what came out."""

    seconds: dict[str, float]
    counts: dict[str, int]


def flux(double: int, single: int) -> tuple[nn.Module, dict[str, Any]]:
    """The published FLUX.1-dev configuration with that many blocks, and one call of it, all on the meta device."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True, num_layers=double, num_single_layers=single).eval()
        call = {
            "hidden_states": torch.empty(1, SIDE * SIDE, 64),
            "encoder_hidden_states": torch.empty(1, TEXT, 4096),
            "pooled_projections": torch.empty(1, 768),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(SIDE * SIDE, 3),
            "txt_ids": torch.empty(TEXT, 3),
            "return_dict": False,
        }
    return model.requires_grad_(False), call


def measure(double: int, single: int, plan: Plan) -> Found:
    """Take a new model through capture and passes."""
    model, call = flux(double, single)
    seconds: dict[str, float] = {}

    def timed(phase: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        seconds[phase] = time.perf_counter() - begin
        return result

    program = timed(PHASES[0], lambda: capture(model, (), call))
    inference = timed(PHASES[1], lambda: infer(program, rulebook()))
    units = timed(PHASES[2], lambda: choose_units(inference, plan))
    analysis = Analysis(program, inference, units)
    placed = timed(PHASES[3], lambda: place(analysis, plan, Mesh.simulated(plan, 0)))
    counts = _counts("captured", program) | _counts("partitioned", placed.program)
    counts["gathers"] = len(placed.ledger.gathers)
    counts["collectives"] = len(placed.ledger.collectives)
    return Found(seconds, counts)


def _counts(what: str, program: Program) -> dict[str, int]:
    """Nodes kept once per structure, and what they would be if every call had its own."""
    nodes = {name: len(graph.graph.nodes) for name, graph in program.structures().items()}
    return {
        f"{what} structures": len(nodes),
        f"{what} calls": len(program.calls()),
        f"{what} nodes, each structure once": sum(nodes.values()),
        f"{what} nodes, every call": sum(nodes[str(call.target)] for call in program.calls()),
    }


@click.command()
@click.option("--double", default=19, show_default=True, help="Double blocks.")
@click.option("--single", default=38, show_default=True, help="Single blocks.")
@click.option("--ulysses", default=2, show_default=True)
@click.option("--ring", default=1, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(double: int, single: int, ulysses: int, ring: int, rounds: int, json_file: pathlib.Path | None) -> None:
    """Time capture and passes on FLUX without weights."""
    console = Console()
    torch.set_num_threads(1)
    found = [measure(double, single, Plan(ulysses=ulysses, ring=ring)) for _ in range(rounds)]
    title = f"FLUX, {double} + {single} blocks, meta device, ulysses={ulysses}, ring={ring}; {rounds} rounds"
    table = Table("phase", title=title, title_justify="left")
    for column in ("first s", "median s"):
        table.add_column(column, justify="right")
    for phase in PHASES:
        taken = [one.seconds[phase] for one in found]
        table.add_row(phase, f"{taken[0]:.2f}", f"{statistics.median(taken):.2f}")
    totals = [sum(one.seconds.values()) for one in found]
    table.add_row("all", f"{totals[0]:.2f}", f"{statistics.median(totals):.2f}", end_section=True)
    for name, count in found[0].counts.items():
        table.add_row(name, f"{count:,}", "")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    table.add_row("most memory of the process, MiB", f"{memory:,.0f}", "")
    console.print(table)
    if json_file:
        about = {
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("torch", "diffusers")}
            | {"python": platform.python_version()},
            "cores": os.cpu_count(),
            "load_average": os.getloadavg(),
        }
        json_file.write_text(
            json.dumps({**about, "rounds": [dataclasses.asdict(one) for one in found]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
