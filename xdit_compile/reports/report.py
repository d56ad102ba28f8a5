"""What ``explain`` answers with: how a module is split, what that costs, and what could not be understood."""

from __future__ import annotations

import collections
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from xdit_compile.compiler import Analysis
from xdit_compile.ir.axes import Axis, Concat, Product, atoms
from xdit_compile.passes.axes.axis_roles import roles
from xdit_compile.passes.axes.infer import Inference, Place
from xdit_compile.passes.fuse import fusions
from xdit_compile.passes.fuse.timings import Timings
from xdit_compile.passes.local.ledger import Gather
from xdit_compile.passes.partition.hide_exchanges import told as hidden_told
from xdit_compile.passes.partition.program import Partitioned

from .attention_report import attention_lines
from .counted_report import CountedReport, rendered

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class AxisEntry:
    """An axis with a role: its structure, whether the plan splits it, and where it was first seen."""

    axis: str
    role: str
    size: int
    split: bool
    where: str


@dataclasses.dataclass(frozen=True)
class BoundaryEntry:
    """A dim whose meaning ends at a node, and why."""

    place: Place
    dim: int
    reason: str


@dataclasses.dataclass(frozen=True)
class CollectiveEntry:
    """One kind of collective: calls, elements and bytes that leave this rank in one call of the module.

    Of ``exposed`` bytes nothing hides that they travel: the graph has nothing to compute meanwhile. Whether what there
    is takes as long as the others is not counted.
    """

    op: str
    purpose: str
    count: int
    elements: int
    bytes: int
    exposed: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """How a plan splits one call of a module, seen from one rank.

    ``imbalance`` is the busiest rank's arithmetic over the mean; ``replicated_flops`` the share of the graph's
    arithmetic that every rank repeats; ``memory`` bytes by kind on this rank: ``weights``, the ``largest_activation``,
    and the ``keys_values`` of the attention with most of them; ``seconds`` those of each pass; ``ready`` how long the
    call took to be ready, and where its graphs came from; ``fused`` what passes joined, and why not the rest;
    ``attention`` which kernels compute it, and why not others; ``counted`` what a card would run, where one was asked
    for. Exact methods keep nothing from step to step.
    """

    ranks: int
    captured_by: str
    blocks: int
    structures: int
    axes: tuple[AxisEntry, ...]
    boundaries: tuple[BoundaryEntry, ...]
    gathers: tuple[Gather, ...]
    collectives: tuple[CollectiveEntry, ...]
    imbalance: float
    replicated_flops: float
    flops: float
    memory: dict[str, int]
    seconds: tuple[tuple[str, float], ...] = dataclasses.field(default=(), compare=False)
    ready: str = dataclasses.field(default="", compare=False)
    fused: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    counted: CountedReport | None = None

    def __str__(self) -> str:
        return printed(_rendered(self))

    __repr__ = __str__


def printed(parts: Iterable[Any]) -> str:
    """What rich prints of some parts, 120 columns wide and without colours."""
    from rich.console import Console

    written = io.StringIO()
    console = Console(file=written, width=120, color_system=None, force_jupyter=False)
    for part in parts:
        console.print(part)
    return written.getvalue().rstrip()


def report(
    analysis: Analysis, ranks: Sequence[Partitioned], here: int, ready: str = "", without: Sequence[str] = (),
    device: torch.device = CPU, timings: Timings | None = None,
) -> Report:  # fmt: skip
    """Sum up an analysis and the programs of all ranks, from the view of rank ``here``.

    Args:
        ready: how long the call took to be ready.
        without: passes that were left out.
        device: what it runs on.
        timings: what was measured there of what passes can change.
    """
    mine = ranks[here]
    ledger = mine.ledger
    work = [rank.ledger.flops_here for rank in ranks]
    mean = sum(work) / len(work)
    program = analysis.program
    return Report(
        ranks=len(ranks),
        captured_by=program.how,
        blocks=sum(bool(call.meta.get("repeated")) for call in program.calls()),
        structures=len(program.structures()),
        axes=_axes(analysis.inference, mine),
        boundaries=_boundaries(analysis.inference),
        gathers=tuple(gather for gather in ledger.gathers if gather.reason != OUTPUT),
        collectives=_collectives(mine),
        imbalance=max(work) / mean if mean else 1.0,
        replicated_flops=ledger.flops_replicated / ledger.flops if ledger.flops and len(ranks) > 1 else 0.0,
        flops=ledger.flops,
        memory=_memory(mine),
        seconds=analysis.seconds,
        ready=ready,
        fused=(*fusions.told(mine.program, without, device, timings), *hidden_told(mine.program, mine.layout.link)),
        attention=attention_lines(mine.program, device),
    )


OUTPUT = "the result"
SUMMED = ("elements", "bytes", "exposed")


def _boundaries(inference: Inference) -> tuple[BoundaryEntry, ...]:
    return tuple(
        BoundaryEntry(inference.place(frame, node), boundary.dim, boundary.reason)
        for frame, node, op_axes in inference.nodes()
        for boundary in op_axes.boundaries
    )


def _collectives(mine: Partitioned) -> tuple[CollectiveEntry, ...]:
    grouped = collections.defaultdict(list)
    for item in mine.ledger.collectives:
        grouped[item.op, item.purpose].append(item)
    return tuple(
        CollectiveEntry(op, purpose, len(items), *(sum(getattr(i, what) for i in items) for what in SUMMED))
        for (op, purpose), items in grouped.items()
    )


def _axes(inference: Inference, mine: Partitioned) -> tuple[AxisEntry, ...]:
    """Axes by role; axes of one role and shape that only differ from block to block are listed once."""
    names = AxisNames()
    entries: dict[tuple[str, str], AxisEntry] = {}
    for use in roles(inference):
        split = any(one.splits(use.axis) for one in mine.layout.sharding.splits.values())
        where = inference.place(use.frame, use.node)
        tokens = use.role.endswith("tokens")
        key = (names.write(use.axis) if tokens else repr(use.axis.size), use.role)
        if key not in entries:
            entries[key] = AxisEntry(names.write(use.axis), use.role, use.axis.size, split, where.path or where.node)
    return tuple(entries.values())


class AxisNames:
    """Writes axes with short letters for atoms, the same letter wherever an atom stands."""

    def __init__(self) -> None:
        self._letters: dict[int, str] = {}

    def write(self, axis: Axis) -> str:
        if isinstance(axis, Product):
            return "(" + "·".join(self.write(factor) for factor in axis.factors) + ")"
        if isinstance(axis, Concat):
            return "[" + " | ".join(self.write(part) for part in axis.parts) + "]"
        (atom,) = atoms(axis)
        letter = self._letters.setdefault(id(atom), _letter(len(self._letters)))
        return f"{letter}={atom.size}"


def _letter(number: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters[number % 26] + (str(number // 26) if number >= 26 else "")


def _memory(mine: Partitioned) -> dict[str, int]:
    program = mine.program
    by_name = {node.name: node for node in program.root.graph.nodes if node.op == "placeholder"}
    weights = 0
    for spec in program.inputs:
        if spec.kind in ("parameter", "buffer"):
            value = by_name[spec.name].meta["val"]
            weights += math.prod(spec.sizes(value.shape)) * value.element_size()
    ledger = mine.ledger
    return {"weights": weights, "largest_activation": ledger.largest_activation, "keys_values": ledger.keys_values}


def _memory_line(memory: dict[str, int]) -> str:
    named = (f"{name.replace('_', ' ')} {size / 2**20:,.1f} MiB" for name, size in memory.items())
    return f"on this rank {', '.join(named)}"


def lines_of_making(seconds: Sequence[tuple[str, float]], ready: str) -> list[str]:
    """What passes took, and what became of the whole call, where that is known; each on a line."""
    passes = [f"passes: {', '.join(f'{name} {taken:.2f} s' for name, taken in seconds)}"] if seconds else []
    return [*passes, *([ready] if ready else [])]


def _rendered(summary: Report) -> list[Any]:
    from rich.markup import escape
    from rich.table import Table

    axes = Table("axis", "role", "size", "split", "first seen", title="axes", title_justify="left")
    for entry in summary.axes:
        axes.add_row(
            entry.axis.replace("[", r"\["), entry.role, str(entry.size), "yes" if entry.split else "", entry.where
        )
    collectives = Table(
        "collective", "purpose", "calls", "elements", "bytes", "of these exposed", title_justify="left",
        title=f"per call of the module, leaving this rank; {sum(item.exposed for item in summary.collectives):,} bytes "
        "that nothing hides",
    )  # fmt: skip
    for item in summary.collectives:
        sizes = [f"{getattr(item, what):,}" for what in SUMMED]
        collectives.add_row(item.op, item.purpose, str(item.count), *sizes)
    gathers = Table("node", "in a block", "reason", "bytes", title="gathers", title_justify="left")
    for gather in summary.gathers:
        place = f"{gather.place.path} {gather.place.node}".strip()
        gathers.add_row(place, "yes" if gather.place.repeated else "", gather.reason, f"{gather.bytes:,}")
    ranks = f"{summary.ranks} rank{'s' if summary.ranks > 1 else ''}"
    head = (
        f"{ranks}; captured by {summary.captured_by}; {summary.blocks} repeated blocks, "
        f"{summary.structures} distinct structures\n{summary.flops / 1e9:,.2f} GFLOP a call; "
        f"{summary.replicated_flops:.2%} replicated; busiest rank {summary.imbalance:.3f} of the mean; "
        f"{_memory_line(summary.memory)}; {len(summary.boundaries)} boundaries"
    )
    said = [*summary.fused, *map(escape, summary.attention), *lines_of_making(summary.seconds, summary.ready)]
    parts: list[Any] = [head, *said, axes, collectives]
    parts.append(gathers if summary.gathers else "no gathers but the result")
    if summary.boundaries:
        counted = collections.Counter((entry.place.target, entry.reason) for entry in summary.boundaries)
        table = Table("operator", "reason", "times", title="boundaries", title_justify="left")
        for (target, reason), count in counted.most_common(20):
            table.add_row(target, reason.replace("[", r"\["), str(count))
        parts.append(table)
    return parts + (rendered(summary.counted) if summary.counted else [])
