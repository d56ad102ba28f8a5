"""What a card would run of a plan on one rank, for `explain`: every program compiled for the card, and counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from torch import fx

from xdit_compile.backends.target.cards import Card
from xdit_compile.backends.target.pretend_card import DEVICE, Binary, kept_on_host
from xdit_compile.compiler import BEFORE_DEVICES, PASSES, Analysis, Compilation, compiled, run_passes
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import one_line
from xdit_compile.plan import Plan

from .counting.counts import Counted
from .counting.table import COUNTED, spills, table_of


@dataclasses.dataclass(frozen=True)
class CountedProgram:
    """One program of a rank by its name, and its structures in the order of their first calls.

    ``uncounted`` says why it could not be counted; then there are no rows.
    """

    name: str
    rows: tuple[Counted, ...]
    uncounted: str = ""


@dataclasses.dataclass(frozen=True)
class CountedReport:
    """What a card would run of one call of a module on one rank. Counted in generated code, nothing was measured.

    Args:
        dtypes: of the floating-point inputs and weights.
        made: the versions that generated the code.
    """

    target: str
    card: Card
    dtypes: tuple[str, ...]
    made: str
    programs: tuple[CountedProgram, ...]


def on_paper(analysis: Analysis, plan: Plan, mesh: Mesh) -> Compilation:
    """What a rank has of a plan before it is compiled, with the passes that are for CUDA devices; without a device.

    Raises:
        PartitionError: as `compiled` does.
    """
    state = compiled(analysis, plan, mesh, until=BEFORE_DEVICES)
    with kept_on_host():
        return run_passes(dataclasses.replace(state, device=DEVICE), after=BEFORE_DEVICES, until=PASSES[-2].name)


def counted_report(
    state: Compilation, card: Card, binaries: list[Binary], step: Callable[[int], None] = lambda more: None
) -> CountedReport:  # fmt: skip
    """Compile everything that a rank runs for the card, which is pretended to be there, and count.

    Args:
        state: as `on_paper` left it.
        binaries: what Triton compiles, as `pretend_card` gives it.
        step: told how many more structures are counted.
    """
    from .counting.count import counted

    programs = []
    for name, program in state.programs.items():
        try:
            programs.append(CountedProgram(name, tuple(counted(program, binaries, card, step))))
        except (ValueError, RuntimeError) as error:
            reason, _, _ = one_line(error).partition(" While executing ")
            programs.append(CountedProgram(name, (), reason))
    made = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton"))
    return CountedReport(card.target, card, _dtypes(state), made, tuple(programs))


def _dtypes(state: Compilation) -> tuple[str, ...]:
    inputs: list[fx.Node] = []
    for program in state.programs.values():
        inputs += program.root.graph.find_nodes(op="placeholder")
    kinds = {each.meta["val"].dtype for each in inputs if each.meta["val"].is_floating_point()}
    return tuple(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def rendered(summary: CountedReport) -> list[Any]:
    """A table for each program, and a line for each kernel with a stack."""
    card = summary.card
    parts: list[Any] = [
        f"{COUNTED}: what inductor and Triton generate for {summary.target} ({card.name}), "
        f"{', '.join(summary.dtypes)}, {summary.made}\nroofline: the sum over kernels of the larger of arithmetic at "
        f"{card.flops / 1e12:,.0f} TFLOP/s (its peak in bfloat16) and bytes at {card.bandwidth / 1e12:,.2f} TB/s; "
        "floor: the same of one kernel that reads inputs and writes results once"
    ]
    for program in summary.programs:
        if program.uncounted:
            parts.append(f"{program.name}: not counted, as {program.uncounted}")
        else:
            parts += [table_of(program.rows, f"{program.name}: counted on this rank"), *spills(program.rows)]
    return parts
