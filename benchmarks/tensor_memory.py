"""What each rank holds of the weights with tensor parallelism, for denoisers at their published sizes.

Nothing is loaded or computed: models and inputs are on the meta device, and the slices are those that every rank's
program asks for. What stays whole is listed by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import click
import torch
from capture import flux
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.table import Table
from torch import nn

from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import Analysis, place
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.rules.registry import rulebook

LISTED = 6


def wan() -> tuple[nn.Module, dict[str, Any]]:
    """The published Wan 2.1 14B text-to-video configuration and one call for 81 frames of 480 x 832 pixels."""
    with torch.device("meta"):
        model = WanTransformer3DModel().eval()
        call = {
            "hidden_states": torch.empty(1, 16, 21, 60, 104),
            "encoder_hidden_states": torch.empty(1, 512, 4096),
            "timestep": torch.empty(1),
            "return_dict": False,
        }
    return model.requires_grad_(False), call


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], float]] = {
    "FLUX.1-dev": (lambda: flux(19, 38), 1.10),
    "Wan 2.1 14B": (wan, 1.15),
}


@dataclasses.dataclass(frozen=True)
class Held:
    """Parameters of one model in all and on the fullest rank, and what is whole on every rank, largest first."""

    model: str
    ranks: int
    parameters: int
    fullest: int
    whole: dict[str, int]

    @property
    def ratio(self) -> float:
        """The fullest rank over an even share."""
        return self.fullest * self.ranks / self.parameters


def measure(name: str, degrees: tuple[int, ...]) -> list[Held]:
    """Capture one model once and partition it for every degree."""
    model, call = MODELS[name][0]()
    program = capture(model, (), call)
    inference = infer(program, rulebook())
    sizes = {key: value.shape for key, value in model.named_parameters()}
    found = []
    for degree in degrees:
        plan = Plan(tensor=degree)
        analysis = Analysis(program, inference, choose_units(inference, plan))
        held = []
        whole: dict[str, int] = {}
        for rank in range(degree):
            taken = 0
            for given in place(analysis, plan, Mesh.simulated(plan, rank)).program.inputs:
                if given.kind != "parameter":
                    continue
                count = math.prod(given.sizes(sizes[str(given.target)]))
                taken += count
                if not given.pieces:
                    whole[str(given.target)] = count
            held.append(taken)
        ordered = dict(sorted(whole.items(), key=lambda item: -item[1]))
        found.append(Held(name, degree, sum(map(math.prod, sizes.values())), max(held), ordered))
    return found


@click.command()
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True, default=tuple(MODELS))
@click.option("--degree", "degrees", type=click.IntRange(2), multiple=True, default=(2, 4, 8), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(models: tuple[str, ...], degrees: tuple[int, ...], json_file: pathlib.Path | None) -> None:
    """Count the parameters that each rank holds."""
    console = Console()
    found = [held for model in models for held in measure(model, degrees)]
    table = Table("model", title=f"parameters by rank with tensor=N, torch {torch.__version__}", title_justify="left")
    for column in ("N", "P, millions", "fullest rank", "x P/N", "bound", "whole on every rank"):
        table.add_column(column, justify="right")
    for held in found:
        bound = MODELS[held.model][1]
        table.add_row(
            held.model,
            str(held.ranks),
            f"{held.parameters / 1e6:,.1f}",
            f"{held.fullest / 1e6:,.1f}",
            f"{held.ratio:.3f}",
            f"{bound:.2f} {'met' if held.ratio <= bound else 'NOT MET'}",
            f"{sum(held.whole.values()) / 1e6:,.2f}",
        )
    console.print(table)
    for held in {held.model: held for held in found}.values():
        largest = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in list(held.whole.items())[:LISTED])
        console.print(f"{held.model}, whole (millions): {largest}; {len(held.whole)} in all")
    if json_file is not None:
        versions = {"torch": torch.__version__, "diffusers": version("diffusers")}
        content = {"versions": versions, "held": [dataclasses.asdict(held) | {"ratio": held.ratio} for held in found]}
        json_file.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
