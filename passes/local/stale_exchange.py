"""What ranks leave one another of what they keep from call to call, while they go on (DistriFusion, arXiv:2402.19481).

A state of a rank has its own rows, and rows of other ranks as they were one call ago. Around every call of a structure
that has states the root graph takes in what arrived for them since the last time, and sends off this rank's own rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

import xdit_compile.kernels.collectives  # noqa: F401  (registers the ops that the graph calls)
import xdit_compile.kernels.stale_rows  # noqa: F401  (registers stale_finish)
from xdit_compile.kernels.collectives import owned_rows, rows_got, rows_sent

from .halo_window import Request

aten, ops = torch.ops.aten, torch.ops.xdit_compile
Runs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the rows of a state come from other ranks.

    All ranks' rows are counted one after the other, in rank order: rank ``r`` has ``sizes[r]`` of them and wants those
    from ``starts[r]`` to ``stops[r]``.

    Args:
        dim: where rows are counted.
        own: where this rank's rows are in its state.
        others: where those that arrive belong, in order of arrival; no run holds rows of two ranks.
        index: this rank's place in ``group``.
        group: one in which nothing is waited for within a step: what is would wait for all that was sent off before.
    """

    dim: int
    own: Runs
    others: Runs
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    sizes: tuple[int, ...]
    index: int
    group: str

    @classmethod
    def of_all(cls, dim: int, held: Sequence[np.ndarray], index: int, group: str) -> Exchange:
        """Every rank wants everything; ``held`` are the positions in the state of each rank's rows."""
        sizes = tuple(map(len, held))
        others = tuple(run for rank, positions in enumerate(held) if rank != index for run in runs(positions))
        count = len(held)
        return cls(dim, runs(held[index]), others, (0,) * count, (sum(sizes),) * count, sizes, index, group)

    @classmethod
    def of_rows(cls, request: Request, first: int, group: str) -> Exchange:
        """Rows that windows reach over; the state begins with row ``first`` of all."""
        sizes, starts, stops, index = request.sizes, request.starts, request.stops, request.here
        got = [rows for rows in rows_got(starts, stops, sizes, index) if rows[1] > rows[0]]
        a, b = owned_rows(sizes, index)
        others = tuple((start - first, stop - first) for start, stop in got)
        own = ((a - first, b - first),)
        return cls(request.dim, own, others, tuple(starts), tuple(stops), tuple(sizes), index, group)

    @property
    def rows(self) -> tuple[list[int], list[int], list[int]]:
        """``starts``, ``stops`` and ``sizes``, as ops take them."""
        return list(self.starts), list(self.stops), list(self.sizes)

    def elements(self, shape: Sequence[int]) -> int:
        """How many leave this rank for a state of ``shape``."""
        rows = sum(b - a for a, b in rows_sent(*self.rows, self.index))
        return rows * math.prod(size for at, size in enumerate(shape) if at != self.dim)

    @property
    def whole(self) -> bool:
        """Whether every rank wants everything, so that nobody has to send one thing to each; the same on every rank."""
        return not any(self.starts) and set(self.stops) == {sum(self.sizes)}

    def finish(self, graph: fx.Graph, state: fx.Node, arriving: fx.Node) -> None:
        """Take in what arrived."""
        counts = [b - a for a, b in rows_got(*self.rows, self.index)]
        room = max(self.sizes) if self.whole else 0
        flat = [end for run in self.others for end in run if run[1] > run[0]]
        graph.call_function(ops.stale_finish.default, (state, arriving, self.dim, counts, flat, room, self.group))

    def start(self, graph: fx.Graph, state: fx.Node) -> fx.Node:
        """Send off this rank's rows; what will arrive."""
        pieces: list[Any] = [graph.call_function(aten.slice.Tensor, (state, self.dim, *run)) for run in self.own]
        rows = pieces[0] if len(pieces) == 1 else graph.call_function(aten.cat.default, (pieces, self.dim))
        if self.whole:
            return graph.call_function(ops.gather_start.default, (rows, self.dim, list(self.sizes), self.group))
        return graph.call_function(ops.halo_start.default, (rows, self.dim, *self.rows, self.index, self.group))


def runs(positions: np.ndarray) -> Runs:
    """Stretches of neighbouring positions as ``(start, stop)``; one empty stretch where there are none."""
    if len(positions) == 0:
        return ((0, 0),)
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks))
