"""What a lowering may touch: this rank's graph, the layout, the ledger, values laid out otherwise, states that stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import fx

from xdit_compile.ir.axes import Axis
from xdit_compile.passes.axes.flops import flops
from xdit_compile.passes.axes.infer import Frame, Place
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.plan.methods import PATCH

from .choose_loop import ShardedLoop
from .layout import Layout
from .ledger import STALE
from .local_graph import Value
from .redistribute import Redistributor
from .stale_exchange import Exchange


class LoweringContext(Redistributor):
    """The graph of one call on one rank, as it grows, with its values, its ledger and what stays from call to call.

    ``env`` has the values of every node so far, ``ahead`` results of nodes whose turn has not come.
    """

    def __init__(self, frame: Frame, layout: Layout, place: Callable[[fx.Node], Place]):
        super().__init__(frame, layout, place)
        self.env: dict[fx.Node, list[Value]] = {}
        self.ahead: dict[fx.Node, Value] = {}

    def count(self, node: fx.Node, op_axes: OpAxes, choices: Mapping[str, ShardedLoop]) -> None:
        """Count the work of a node, and how much of it this rank does."""
        total = flops(node)
        if not total:
            return
        portion = 1.0
        for name, choice in choices.items():
            tensor, dim = next(iter(choice.operands.items()), (None, 0))
            axis = (
                op_axes.operand_axes[tensor][dim] if tensor is not None else op_axes.result_axes[0][choice.results[0]]
            )
            portion *= self.sharding.length(axis, [name]) / max(axis.size, 1)
        self.ledger.work(total, portion, tuple(choices))

    def exchange_all(self, dim: int, axis: Axis | None, shape: Sequence[int], dtype: torch.dtype) -> Exchange | None:
        """How a state of which every rank wants all comes from them, counted; None where one rank has all.

        The state has the rows of one rank behind those of the other, in the order of ranks, so that each rank's lie
        together.

        Args:
            dim: the dim that patches split: by ``axis``, or with one row for each where it is None.
            shape: of the state on this rank, with the rows of all patches.
        """
        if not self.layout.apart:
            return None
        here = self.sharding.index[PATCH]
        exchange = Exchange.of_all(dim, self._rows_of_ranks(axis), here, self.layout.mesh.behind)
        self.ledger.sent(
            STALE if self.layout.stale else "all_gather", "state", exchange.rows.elements_sent(shape), dtype
        )
        return exchange

    def _rows_of_ranks(self, axis: Axis | None) -> list[int]:
        """How many rows of a state each rank brings."""
        split = self.sharding.splits[PATCH]
        return [1 if axis is None else split.length(axis, rank) for rank in range(split.parts)]

    def rows_of_patches(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[fx.Node, Exchange | None]:
        """A state [patches, *shape] of what every patch left, and how others' rows come; None where they need not."""
        assert self.layout.patches is not None
        whole = [self.layout.patches.parts, *shape]
        exchange = self.exchange_all(0, None, whole, dtype)
        return self.local.state(name, whole, dtype, exchange), exchange

    def put_row(self, state: fx.Node, exchange: Exchange | None, row: fx.Node) -> None:
        """Put this patch's row, [1, ...], in its place in a state of `rows_of_patches`; where rows are gathered, those
        of all ranks."""
        here = self.sharding.index[PATCH]
        held = np.arange(here, here + 1)
        if exchange is not None and not self.layout.stale:
            gather = torch.ops.xdit_compile.all_gather.default
            row = self.local.call(gather, row, 0, list(exchange.rows.sizes), exchange.rows.group)
            held = np.arange(len(exchange.rows.sizes))
        self.local.put(state, row, 0, held)
