"""Attention over keys and values that stay from call to call (PipeFusion, arXiv:2405.14430; DistriFusion,
arXiv:2402.19481).

Keys and values of all tokens are kept. A program that computes one patch writes those of the patch and reads the others
as they were left: by earlier patches in this step, by later ones or by other ranks in the step before. A program that
computes all tokens writes all of them, and so does one that has them gathered.

Ranks that wait for one another exchange those of a patch before they are kept, so that every rank of a group sees the
same mixture: a rank keeps its heads of the tokens of its Ulysses group, which a ring passes on whole.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from xdit_compile.passes.axes.operators import AttentionOp
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.local.choose_loop import choose_all, required
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.local_graph import Value
from xdit_compile.plan.methods import PATCH, SEQUENCE

from . import attention
from .attention import Exchanged, LocalAttention, exchanges

KEYS, VALUES = 1, 2


def lower(context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
    """What this rank runs for one attention, with what it keeps where its keys are cut into patches.

    Returns:
        The result [..., heads, tokens, channels], split as its queries are; None where every operand is whole and
        nothing is kept.
    """
    assert isinstance(op_axes.operator, AttentionOp)
    patches, tokens = context.layout.patches, op_axes.operator.tokens
    if patches is None or not all(patches.splits(op_axes.operand_axes[operand][tokens]) for operand in (0, KEYS)):
        return attention.lower(context, node, op_axes, operands)
    if context.layout.apart and any(operands[operand].split.get(PATCH) != tokens for operand in (KEYS, VALUES)):
        return attention.lower(context, node, op_axes, operands)
    choices = choose_all(op_axes, operands, context.sharding.splits)
    kept = _KeptExchanged if exchanges(context, op_axes, operands, choices) else _Kept
    return kept(context, node, op_axes, operands, choices).emit()


class _Kept(LocalAttention):
    """Attention over keys and values of all patches.

    Where patches lie on ranks they stand in the order of ranks, each rank's together, which are written and sent off in
    one piece. Elsewhere they stand at their own positions.
    """

    def emit(self) -> list[Value]:
        if self.attention.dropout_p:
            raise ValueError(f"{self.node.name}: attention with dropout cannot be split")
        return super().emit()

    def columns(self) -> np.ndarray:
        axis = self.op_axes.operand_axes[KEYS][self.attention.tokens]
        if not self.context.layout.apart:
            return super().columns()
        split = self.context.sharding.splits[PATCH]
        return np.concatenate([split.positions(axis, rank) for rank in range(split.parts)])

    def local_operand(self, operand: int) -> fx.Node:
        """An operand on this rank; keys and values of all patches, once those of this one are in their place."""
        tokens, axes = self.attention.tokens, self.op_axes.operand_axes[operand]
        if operand == self.attention.mask:
            mask, size = super().local_operand(operand), axes[-1].size
            return mask if size == 1 else self.local.take(mask, len(axes) - 1, self.columns(), size)
        if operand not in (KEYS, VALUES):
            return super().local_operand(operand)
        wanted = required(self.choices, operand)
        here = {PATCH: tokens, **wanted} if PATCH in self.context.sharding.splits else wanted
        rows = self.context.redistribute(self.operands[operand], axes, here, self.node, operand)
        shape = self.context.sharding.sizes(axes, wanted)
        exchange = self.context.exchange_all(tokens, axes[tokens], shape, self.operands[operand].dtype)
        state = self.local.state(f"{self.node.name}_{operand}", shape, self.operands[operand].dtype, exchange)
        if exchange is None:
            names = [name for name, dim in here.items() if dim == tokens]
            held = self.context.sharding.positions(axes[tokens], names)
        elif self.context.layout.stale:
            held = np.arange(*exchange.rows.own)
        else:
            sizes, group = list(exchange.rows.sizes), self.local.group(PATCH)
            rows = self.local.call(torch.ops.xdit_compile.all_gather.default, rows, tokens, sizes, group)
            held = np.arange(shape[tokens])
        self.local.put(state, rows, tokens, held)
        return state


class _KeptExchanged(Exchanged):
    """Attention over this rank's heads of its group's tokens, kept patch after patch, each in the exchange's order."""

    @property
    def along(self) -> list[str]:
        return [PATCH, SEQUENCE] if PATCH in self.context.sharding.splits else [SEQUENCE]

    def attended(self, ring: int) -> np.ndarray:
        patches, split = self.context.layout.patches, self.context.sharding.splits[SEQUENCE]
        assert patches is not None
        held = [split.positions(self.key_axis, index) for index in self.members(ring)]
        of_patch = [patches.positions(self.key_axis, patch) for patch in range(patches.parts)]
        return np.concatenate([rows[np.isin(rows, positions)] for positions in of_patch for rows in held])

    def kept(self, operand: int, rows: fx.Node) -> fx.Node:
        order, exchange = self.attended(self.ring_rank), self.exchange
        incoming = np.concatenate([self.held(self.key_axis, index) for index in self.members(self.ring_rank)])
        places = np.empty(self.key_axis.size, dtype=int)
        places[order] = np.arange(len(order))
        dims = {KEYS: exchange.head_dim, VALUES: exchange.value_dim}
        shape = [*exchange.batch, self.heads.key_count, len(order), dims[operand]]
        state = self.local.state(f"{self.node.name}_{operand}", shape, self.operands[operand].dtype)
        self.local.put(state, rows, len(exchange.batch) + 1, places[incoming])
        return state
