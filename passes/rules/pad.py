"""Rules of operators that put rows around what is there: constants, copies of the edge, mirrored or wrapped rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from xdit_compile.ir.axes import Concat
from xdit_compile.passes.axes.local_call import LocalCall
from xdit_compile.passes.axes.rule import Rule, RuleBook
from xdit_compile.passes.axes.windows import Windows
from xdit_compile.passes.local.halo import moved
from xdit_compile.passes.local.local_graph import aten

BOOK = RuleBook()
MODES = {"reflection_pad": "reflect", "replication_pad": "replicate", "_pad_circular": "circular"}


@BOOK.rule("constant_pad_nd", "pad", "_pad_circular", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
           "replication_pad1d", "replication_pad2d", "replication_pad3d")  # fmt: skip
def pad(rule: Rule) -> None:
    """Windows of one row; padded with a constant, what was there keeps its axis as a part of the result's."""
    rank, amounts = len(rule.actual[0]), list(rule.arg(1, "pad") or rule.arg(1, "padding"))
    name = rule.name
    mode = rule.arg(2, "mode", "constant") if name == "pad" else MODES.get(name.rstrip("d123"), "constant")
    value = rule.arg(3 if name == "pad" else 2, "value") if mode == "constant" else None
    fill = 0.0 if value is None else value
    sides: dict[int, tuple[int | None, int | None]] = {}
    for dim, axis in enumerate(rule.actual[0]):
        before, after = _amounts(amounts, rank, dim)
        if before == after == 0:
            rule.loop("map", [(0, dim)], [(0, dim)])
            continue
        if mode == "constant" and before >= 0 and after >= 0:
            low, high = (rule.system.atom(amount) if amount else None for amount in (before, after))
            sides[dim] = (rule.keep(low), rule.keep(high))
            made = Concat([part for part in (low, axis, high) if part is not None])
            rule.add_join([(0, dim)], [(0, dim)])
        else:
            made = None
        places = np.arange(-before, axis.size + after)
        sources = places if mode == "constant" else _sources(axis.size, (before, after), mode)
        rule.look(dim, Windows.moved(sources, axis.size, places), made)

    def emit(ctx: LocalCall) -> fx.Node:
        local = list(amounts)
        for dim in range(rank):
            first = 2 * (rank - 1 - dim)
            if dim in ctx.seen:
                local[first : first + 2] = [0, 0]
            elif dim in sides:
                local[first : first + 2] = [ctx.length(side, 0, dim) for side in sides[dim]]
        node = moved(ctx, fill)
        return ctx.call(aten.pad.default, node, local, mode, value) if any(local) else node

    rule.emit = emit


def _amounts(amounts: list[int], rank: int, dim: int) -> tuple[int, int]:
    first = 2 * (rank - 1 - dim)
    return (amounts[first], amounts[first + 1]) if first < len(amounts) else (0, 0)


def _sources(size: int, amounts: tuple[int, int], mode: str) -> np.ndarray:
    """Which row is copied to where by a padding that copies; the operator itself says it."""
    rows = torch.arange(size, dtype=torch.float64)[None]
    return aten.pad.default(rows, list(amounts), mode)[0].long().numpy()
