"""Attention over split tokens: Ulysses, ring, and both together (USP, arXiv:2405.07719).

Ulysses (arXiv:2309.14509) exchanges tokens for heads, so that all tokens of one head meet on one rank. Ring attention
(arXiv:2310.01889) lets keys and values travel from rank to rank. Attention does not care in which order keys stand, so
every rank keeps what it holds, and a mask is permuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

import xdit_compile.kernels.attention  # noqa: F401  (registers the op)
import xdit_compile.kernels.ring  # noqa: F401  (registers the op)
from xdit_compile.ir.axes import Axis
from xdit_compile.passes.axes.flops import flops, portion
from xdit_compile.passes.axes.operators import AttentionOp
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.local.choose_loop import ShardedLoop, choose_all, required
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.local_graph import Value, aten
from xdit_compile.plan.methods import SEQUENCE

from .hidden_exchange import HiddenExchange, choose
from .ulysses import HeadExchange

ops = torch.ops.xdit_compile


def lower(context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
    """What this rank runs for one attention, or None where every operand is whole and no provider is named.

    Returns:
        The result [..., heads, tokens, channels], split as its queries are.
    """
    choices = choose_all(op_axes, operands, context.sharding.splits)
    if not choices and context.layout.provider == "auto":
        elements = sum(math.prod(axis.size for axis in axes) for axes in op_axes.operand_axes[1:3])
        context.ledger.hold_keys(elements * node.meta["val"].dtype.itemsize)
        return None
    made = Exchanged if exchanges(context, op_axes, operands, choices) else LocalAttention
    return made(context, node, op_axes, operands, choices).emit()


def exchanges(
    context: LoweringContext, op_axes: OpAxes, operands: list[Value], choices: dict[str, ShardedLoop]
) -> bool:
    """Whether sequence ranks hold parts of the queries and of the keys, so that they exchange tokens for heads.

    Args:
        choices: the loop that each mesh dimension splits.
    """
    assert isinstance(op_axes.operator, AttentionOp)
    tokens = op_axes.operator.tokens
    if SEQUENCE not in choices or choices[SEQUENCE].operands.get(0) != tokens:
        return False
    keys_split = context.sharding.splits[SEQUENCE].splits(op_axes.operand_axes[1][tokens])
    return keys_split and operands[1].split.get(SEQUENCE) == tokens and _one_to_one(op_axes)


def _one_to_one(op_axes: OpAxes) -> bool:
    """Whether no batch entry and no value head is broadcast: those are not exchanged."""
    queries, keys, values = ([axis.size for axis in axes[:-2]] for axes in op_axes.operand_axes[:3])
    whole_groups = not queries or queries[-1] % keys[-1] == 0
    return queries[:-1] == keys[:-1] and keys == values and whole_groups


class LocalAttention:
    """Attention in which no token meets another rank's: other batch entries, or queries over replicated keys."""

    def __init__(
        self,
        context: LoweringContext,
        node: fx.Node,
        op_axes: OpAxes,
        operands: list[Value],
        choices: dict[str, ShardedLoop],
    ):
        self.context, self.node, self.op_axes, self.operands, self.choices = context, node, op_axes, operands, choices
        assert isinstance(op_axes.operator, AttentionOp)
        self.attention = op_axes.operator
        self.local = context.local

    def emit(self) -> list[Value]:
        """The result of this rank's queries."""
        tensors = [self.local_operand(operand) for operand in range(len(self.operands))]
        mask = tensors[3] if len(tensors) > 3 else None
        causal = self.attention.is_causal
        rows = [name for name, choice in self.choices.items() if choice.operands.get(0) == self.attention.tokens]
        if causal and (rows or np.any(np.diff(self.columns()) < 0)):
            mask, causal = self._causal_rows(rows), False
        result = self.local.call(
            ops.attention.default,
            *tensors[:3],
            mask,
            causal,
            self.attention.scale,
            self.attention.enable_gqa,
            self.provider(),
        )
        self.context.count(self.node, self.op_axes, self.choices)
        keys, values_ = (self._held(operand) for operand in (1, 2))
        self.context.ledger.hold_keys((keys + values_) * self.node.meta["val"].dtype.itemsize)
        return [Value(result, self.op_axes.result_axes[0], self.node.meta["val"].dtype, self.results())]

    def results(self) -> dict[str, int]:
        """The dim of the result that each mesh dimension splits."""
        return {name: choice.results[0] for name, choice in self.choices.items()}

    def provider(self) -> str:
        """The name of what computes attention, as the op takes it."""
        return "sdpa" if self.context.layout.provider == "auto" else self.context.layout.provider

    def _held(self, operand: int) -> int:
        """Elements of an operand on this rank."""
        return math.prod(
            self.context.sharding.sizes(self.op_axes.operand_axes[operand], required(self.choices, operand))
        )

    def local_operand(self, operand: int) -> fx.Node:
        """An operand on this rank."""
        axes, split = self.op_axes.operand_axes[operand], required(self.choices, operand)
        return self.context.redistribute(self.operands[operand], axes, split, self.node, operand)

    def _causal_rows(self, names: Sequence[str]) -> fx.Node:
        tokens = self.attention.tokens
        rows = self.context.sharding.positions(self.op_axes.operand_axes[0][tokens], names)
        return self.local.constant(torch.from_numpy(self.columns()[None, :] <= rows[:, None]))

    def columns(self) -> np.ndarray:
        """Positions of the keys that this rank attends to, in the order in which it has them."""
        return np.arange(self.op_axes.operand_axes[1][self.attention.tokens].size)


class Exchanged(LocalAttention):
    """Attention whose keys lie on all ranks."""

    def __init__(
        self,
        context: LoweringContext,
        node: fx.Node,
        op_axes: OpAxes,
        operands: list[Value],
        choices: dict[str, ShardedLoop],
    ):
        super().__init__(context, node, op_axes, operands, choices)
        mesh, tokens = context.layout.mesh, self.attention.tokens
        self.ulysses, self.ring, self.ring_rank = mesh.size("ulysses"), mesh.size("ring"), mesh.coordinate("ring")
        self.query_axis, self.key_axis = op_axes.operand_axes[0][tokens], op_axes.operand_axes[1][tokens]
        self.dtype = node.meta["val"].dtype
        self.exchange = self._exchange()
        self.heads = self.exchange.heads(self.exchange.index)

    def _exchange(self) -> HeadExchange:
        mesh, members = self.context.layout.mesh, self.members(self.ring_rank)
        queries, keys, values_ = (self.sizes(operand) for operand in range(3))
        query_heads, key_heads = (queries[-3], keys[-3]) if len(queries) > 2 else (1, 1)
        return HeadExchange(
            local=self.local,
            ledger=self.context.ledger,
            group=mesh.group("ulysses"),
            index=mesh.coordinate("ulysses"),
            dtype=self.dtype,
            batch=queries[:-3],
            query_heads=query_heads,
            key_heads=key_heads,
            head_dim=queries[-1],
            value_dim=values_[-1],
            query_lengths=[len(self.held(self.query_axis, index)) for index in members],
            key_lengths=[len(self.held(self.key_axis, index)) for index in members],
        )

    @property
    def along(self) -> list[str]:
        """The names of what splits the tokens."""
        return [SEQUENCE]

    def sizes(self, operand: int) -> list[int]:
        """The shape of an operand on this rank with all of its tokens."""
        return self.context.sharding.sizes(self.op_axes.operand_axes[operand], required(self._others(), operand))

    def _others(self) -> dict[str, ShardedLoop]:
        return {name: choice for name, choice in self.choices.items() if name not in self.along}

    def members(self, ring: int) -> list[int]:
        """Sequence ranks of the Ulysses group at coordinate ``ring``, by their number among all of `SEQUENCE`."""
        mesh = self.context.layout.mesh
        outer = mesh.names.index("ring") < mesh.names.index("ulysses")
        return [ring * self.ulysses + u if outer else u * self.ring + ring for u in range(self.ulysses)]

    def held(self, axis: Axis, index: int) -> np.ndarray:
        """Positions of a token axis that a sequence rank brings to the exchange, in its order."""
        return self.context.sharding.positions(axis, self.along, {SEQUENCE: index})

    def attended(self, ring: int) -> np.ndarray:
        """Positions of the keys that the Ulysses group at coordinate ``ring`` has, in the order in which it does."""
        return np.concatenate([self.held(self.key_axis, index) for index in self.members(ring)])

    def kept(self, operand: int, rows: fx.Node) -> fx.Node:
        """Keys or values to attend to, given the ``rows`` that the exchange brought: of this rank's heads."""
        return rows

    def emit(self) -> list[Value]:
        """The result of this rank's queries.

        Raises:
            ValueError: for attention with dropout, or a mask of more dims than its queries.
        """
        if self.attention.dropout_p:
            raise ValueError(f"{self.node.name}: attention with dropout cannot be split")
        link = self.context.layout.link if self.ring == 1 and self.context.layout.patches is None else None
        hiding = choose(self.exchange, link)
        result = self._at_once() if hiding is None else self._hidden(HiddenExchange(self.exchange, hiding))
        self._count()
        return [Value(result, self.op_axes.result_axes[0], self.dtype, self.results())]

    def _at_once(self) -> fx.Node:
        q, k, v = (self.local_operand(operand) for operand in range(3))
        if len(self.op_axes.operand_axes[0]) == 2:
            q, k, v = (self.local.call(aten.unsqueeze.default, x, 0) for x in (q, k, v))
        q, k, v = self.exchange.to_heads(q, k, v)
        k, v = (self._aligned(self.kept(operand, rows)) for operand, rows in ((1, k), (2, v)))
        result = self.exchange.to_tokens(self._attend(q, k, v, self._mask()))
        if len(self.op_axes.operand_axes[0]) == 2:
            result = self.local.call(aten.squeeze.dim, result, 0)
        return result

    def _hidden(self, exchange: HiddenExchange) -> fx.Node:
        """The same with a part of the exchange under way while something is computed; every key head is whole here."""
        v = self.local_operand(2)
        q, k, v = exchange.to_heads(v, lambda: (self.local_operand(0), self.local_operand(1)))
        mask, dim = self._mask(), len(self.exchange.batch)

        def some(tensor: fx.Node, heads: slice) -> fx.Node:
            return self.local.call(aten.slice.Tensor, tensor, dim, heads.start, heads.stop)

        def attend(queries: slice, keys: slice) -> fx.Node:
            if queries.stop - queries.start == self.heads.query_count:
                return self._attend(q, k, v, mask)
            return self._attend(some(q, queries), some(k, keys), some(v, keys), self._mask_of(mask, queries))

        return exchange.to_tokens(attend)

    def local_operand(self, operand: int) -> fx.Node:
        """An operand on this rank, its tokens split."""
        split = {**required(self._others(), operand), **dict.fromkeys(self.along, self.attention.tokens)}
        axes = self.op_axes.operand_axes[operand]
        return self.context.redistribute(self.operands[operand], axes, split, self.node, operand)

    def _count(self) -> None:
        exchange, total = self.exchange, flops(self.node)
        rows = portion(sum(exchange.query_lengths), self.query_axis.size)
        mine = portion(self.heads.query_count, exchange.query_heads)
        others = portion(
            math.prod(self.sizes(0)[:-2]), math.prod(axis.size for axis in self.op_axes.operand_axes[0][:-2])
        )
        self.context.ledger.work(total, rows * mine * others, tuple(self.choices))
        tokens = len(self.attended(self.ring_rank))
        channels = exchange.head_dim + exchange.value_dim
        held = math.prod(exchange.batch) * self.heads.key_count * tokens * channels
        self.context.ledger.hold_keys(held * self.dtype.itemsize)

    def _aligned(self, keys: fx.Node) -> fx.Node:
        """Key heads repeated so that they stand one to one with query heads, where whole groups were torn apart."""
        if self._are_whole_groups():
            return keys
        wanted = np.arange(*self.heads.queries) // self._group - self.heads.keys[0]
        index = self.local.constant(torch.from_numpy(wanted))
        return self.local.call(aten.index_select.default, keys, len(self.exchange.batch), index)

    def _are_whole_groups(self) -> bool:
        """Whether every key head is here with all query heads that attend to it."""
        return self._group == 1 or self.heads.query_count == self.heads.key_count * self._group

    @property
    def _group(self) -> int:
        """Query heads that attend to one key head; none where a rank of ``tensor`` has no heads."""
        return self.exchange.query_heads // max(self.exchange.key_heads, 1)

    def _grouped(self) -> bool:
        return self.attention.enable_gqa and self._are_whole_groups()

    def _attend(self, q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None) -> fx.Node:
        scale, provider = self.attention.scale, self.context.layout.provider
        if self.ring == 1:
            return self.local.call(ops.attention.default, q, k, v, mask, False, scale, self._grouped(), self.provider())
        exchange, lengths = self.exchange, [len(self.attended(ring)) for ring in range(self.ring)]
        one_to_one = exchange.query_heads != exchange.key_heads and not self._grouped()
        count = self.heads.query_count if one_to_one else self.heads.key_count
        elements = math.prod(exchange.batch) * count * (exchange.head_dim + exchange.value_dim)
        sent = sum(lengths[(self.ring_rank - step) % self.ring] for step in range(self.ring - 1)) * elements
        self.context.ledger.sent("ring_attention", "attention", sent, self.dtype)
        group = self.context.layout.mesh.group("ring")
        return self.local.call(
            ops.ring_attention.default, q, k, v, mask, lengths, scale, self._grouped(), group, provider
        )

    def _mask_of(self, mask: fx.Node | None, heads: slice) -> fx.Node | None:
        """What of this rank's mask is for some of its heads."""
        shape = [1] if mask is None or self.attention.mask is None else self.sizes(self.attention.mask)
        if len(shape) < 3 or shape[-3] == 1:
            return mask
        return self.local.call(aten.slice.Tensor, mask, len(shape) - 3, heads.start, heads.stop)

    def _mask(self) -> fx.Node | None:
        """The mask of this rank's heads and queries, its columns in the order in which keys arrive."""
        rows = np.concatenate([self.held(self.query_axis, index) for index in self.members(self.ring_rank)])
        columns = np.concatenate([self.attended(ring) for ring in range(self.ring)])
        if self.attention.is_causal:
            return self.local.constant(torch.from_numpy(columns[None, :] <= rows[:, None]))
        operand = self.attention.mask
        if operand is None:
            return None
        axes, split = self.op_axes.operand_axes[operand], required(self._others(), operand)
        mask, shape = (
            self.context.redistribute(self.operands[operand], axes, split, self.node, operand),
            self.sizes(operand),
        )
        heads = np.arange(*self.heads.queries) if self.ulysses > 1 else None
        for back, positions in {-1: columns, -2: rows, -3: heads}.items():
            if positions is not None and len(shape) >= -back and shape[back] > 1:
                mask = self.local.take(mask, len(shape) + back, positions, shape[back])
        if len(self.op_axes.operand_axes[0]) == 2 and len(shape) > 2:
            raise ValueError(f"{self.node.name}: a mask of more dims than its queries")
        return mask
