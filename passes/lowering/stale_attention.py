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
from torch import fx

from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.local.choose_loop import choose_all, required
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.layout import PATCH, SEQUENCE
from xdit_compile.passes.local.local_graph import Value

from . import attention
from .attention import Exchanged, LocalAttention, exchanges

KEYS, VALUES = 1, 2


def lower(part: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
    """What this rank runs for one attention, with what it keeps where its keys are cut into patches."""
    patches, tokens = part.layout.patches, op_axes.facts["attention"]["tokens"]
    if patches is None or not all(patches.splits(op_axes.operand_axes[at][tokens]) for at in (0, KEYS)):
        return attention.lower(part, node, op_axes, operands)
    if part.layout.apart and any(operands[at].split.get(PATCH) != tokens for at in (KEYS, VALUES)):
        return attention.lower(part, node, op_axes, operands)
    choices = choose_all(op_axes, operands, part.sharding.splits)
    kept = _KeptExchanged if exchanges(part, op_axes, operands, choices) else _Kept
    return kept(part, node, op_axes, operands, choices).emit()


class _Kept(LocalAttention):
    """Attention over keys and values at their own positions, whole on every rank."""

    def emit(self) -> list[Value]:
        if self.facts["dropout_p"]:
            raise ValueError(f"{self.node.name}: attention with dropout cannot be split")
        return super().emit()

    def coerced(self, at: int) -> fx.Node:
        """An operand on this rank; keys and values of all patches, once those of this one are in their place."""
        if at not in (KEYS, VALUES):
            return super().coerced(at)
        tokens, axes = self.facts["tokens"], self.op_axes.operand_axes[at]
        wanted = required(self.choices, at)
        here = {PATCH: tokens, **wanted} if PATCH in self.part.sharding.splits else wanted
        rows = self.part.redistribute(self.operands[at], axes, here, self.node, at)
        shape = self.part.sharding.sizes(axes, wanted)
        names = [name for name, dim in here.items() if dim == tokens]
        held = self.part.sharding.positions(axes[tokens], names)
        exchange = self.part.exchange_all(tokens, axes[tokens], shape, self.operands[at].dtype)
        state = self.local.state(f"{self.node.name}_{at}", shape, self.operands[at].dtype, exchange)
        if exchange is not None and not self.part.layout.stale:
            rows, _ = self.local.gather(rows, tokens, axes[tokens], PATCH, [name for name in names if name != PATCH])
            held = np.arange(shape[tokens])
        self.local.put(state, rows, tokens, held)
        return state


class _KeptExchanged(Exchanged):
    """Attention over this rank's heads of its group's tokens, kept patch after patch, each in the exchange's order."""

    @property
    def along(self) -> list[str]:
        return [PATCH, SEQUENCE] if PATCH in self.part.sharding.splits else [SEQUENCE]

    def attended(self, ring: int) -> np.ndarray:
        patches, split = self.part.layout.patches, self.part.sharding.splits[SEQUENCE]
        assert patches is not None
        held = [split.positions(self.key_axis, index) for index in self.members(ring)]
        of_patch = [patches.positions(self.key_axis, patch) for patch in range(patches.parts)]
        return np.concatenate([own[np.isin(own, positions)] for positions in of_patch for own in held])

    def exchanged(self, at: int, rows: fx.Node) -> fx.Node:
        order = self.attended(self.r)
        arrived = np.concatenate([self.held(self.key_axis, index) for index in self.members(self.r)])
        places = np.empty(self.key_axis.size, dtype=int)
        places[order] = np.arange(len(order))
        heads = self.heads(self.u).key_count if self.ulysses > 1 else self.key_heads
        dims = {KEYS: self.head_dim, VALUES: self.value_dim}
        shape = [*self.batch, heads, len(order), dims[at]]
        state = self.local.state(f"{self.node.name}_{at}", shape, self.operands[at].dtype)
        self.local.put(state, rows, len(self.batch) + 1, places[arrived])
        return state
