"""What ranks leave one another of what they keep from call to call, while they go on (DistriFusion, arXiv:2402.19481).

A state of a rank has its own rows, and rows of other ranks as they were one call ago. Around every call of a structure
that has states the root graph takes in what arrived for them since the last time, and sends off this rank's own rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

import xdit_compile.kernels.collectives  # noqa: F401  (registers the ops that the graph calls)
import xdit_compile.kernels.stale_rows  # noqa: F401  (registers stale_finish)
from xdit_compile.kernels.collectives.row_exchange import RowExchange

from .halo_request import Request

aten, ops = torch.ops.aten, torch.ops.xdit_compile
Runs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How the rows of a state come from other ranks.

    Args:
        rows: who has which, and wants which; in a group in which nothing is waited for within a step: what is would
            wait for all that was sent off before.
        own: where this rank's rows are in its state.
        others: where those that arrive belong, in order of arrival; no run holds rows of two ranks.
    """

    rows: RowExchange
    own: Runs
    others: Runs

    @classmethod
    def of_all(cls, dim: int, sizes: Sequence[int], index: int, group: str) -> Exchange:
        """Every rank wants everything, and finds it in the order of ranks.

        Args:
            dim: where rows are counted.
            sizes: how many rows each rank has.
            index: this rank's number in the group.
        """
        rows = RowExchange(dim, (0,) * len(sizes), (sum(sizes),) * len(sizes), tuple(sizes), index, group)
        others = tuple(rows.of_rank(rank) for rank in range(len(sizes)) if rank != index)
        return cls(rows, (rows.own,), others)

    @classmethod
    def of_rows(cls, request: Request, first: int, group: str) -> Exchange:
        """Rows that windows reach over; the state begins with row ``first``, counted over all ranks."""
        rows = dataclasses.replace(request.rows, group=group)
        others = tuple((start - first, stop - first) for start, stop in rows.got if stop > start)
        return cls(rows, ((rows.own[0] - first, rows.own[1] - first),), others)

    def finish(self, graph: fx.Graph, state: fx.Node, incoming: fx.Node) -> None:
        """Write what arrived to its place in a state; ``incoming`` is what `start` made in the call before."""
        rows = self.rows
        counts = [b - a for a, b in rows.got]
        room = max(rows.sizes) if rows.whole else 0
        flat = [end for run in self.others for end in run if run[1] > run[0]]
        graph.call_function(ops.stale_finish.default, (state, incoming, rows.dim, counts, flat, room, rows.group))

    def start(self, graph: fx.Graph, state: fx.Node) -> fx.Node:
        """Send off this rank's rows of a state; the node is flat room for what will arrive, by rank."""
        rows = self.rows
        pieces: list[Any] = [graph.call_function(aten.slice.Tensor, (state, rows.dim, *run)) for run in self.own]
        outgoing = pieces[0] if len(pieces) == 1 else graph.call_function(aten.cat.default, (pieces, rows.dim))
        if rows.whole:
            return graph.call_function(ops.gather_start.default, (outgoing, rows.dim, list(rows.sizes), rows.group))
        return graph.call_function(ops.halo_start.default, (outgoing, *rows.arguments))


def runs(positions: np.ndarray) -> Runs:
    """Stretches of neighbouring positions as ``(start, stop)``; one empty stretch where there are none."""
    if len(positions) == 0:
        return ((0, 0),)
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks))
