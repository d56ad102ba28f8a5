"""Attention over split tokens: Ulysses, ring, and both together (USP, arXiv:2405.07719).

Ulysses (arXiv:2309.14509) exchanges tokens for heads: queries, keys and values of one head travel to one rank, packed
in one all-to-all, and the result travels back in another. Ring attention (arXiv:2310.01889) lets keys and values travel
from rank to rank. Attention does not care in which order keys stand, so every rank keeps what it holds, and a mask is
permuted.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

import xdit_compile.kernels.attention  # noqa: F401  (registers the op)
import xdit_compile.kernels.ring  # noqa: F401  (registers the op)
from xdit_compile.ir.axes import Axis
from xdit_compile.ir.sharding import share
from xdit_compile.passes.axes.flops import flops, portion
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.local.choose_loop import ShardedLoop, choose_all, required
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.layout import SEQUENCE
from xdit_compile.passes.local.local_graph import Value, aten

ops = torch.ops.xdit_compile


def lower(part: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
    """What this rank runs for one attention, or None where every operand is whole."""
    choices = choose_all(op_axes, operands, part.sharding.splits)
    if not choices:
        elements = sum(math.prod(axis.size for axis in axes) for axes in op_axes.operand_axes[1:3])
        part.ledger.hold_keys(elements * node.meta["val"].dtype.itemsize)
        return None
    made = Exchanged if exchanges(part, op_axes, operands, choices) else LocalAttention
    return made(part, node, op_axes, operands, choices).emit()


def exchanges(part: LoweringContext, op_axes: OpAxes, operands: list[Value], choices: dict[str, ShardedLoop]) -> bool:
    """Whether sequence ranks hold parts of the queries and of the keys, so that they exchange tokens for heads."""
    tokens = op_axes.facts["attention"]["tokens"]
    if SEQUENCE not in choices or choices[SEQUENCE].operands.get(0) != tokens:
        return False
    keys_split = part.sharding.splits[SEQUENCE].splits(op_axes.operand_axes[1][tokens])
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
        part: LoweringContext,
        node: fx.Node,
        op_axes: OpAxes,
        operands: list[Value],
        choices: dict[str, ShardedLoop],
    ):
        self.part, self.node, self.op_axes, self.operands, self.choices = part, node, op_axes, operands, choices
        self.facts: dict[str, Any] = op_axes.facts["attention"]
        self.local = part.local

    def emit(self) -> list[Value]:
        tensors = [self.coerced(at) for at in range(len(self.operands))]
        mask = tensors[3] if len(tensors) > 3 else None
        causal = self.facts["is_causal"]
        rows = [name for name, choice in self.choices.items() if choice.operands.get(0) == self.facts["tokens"]]
        if causal and rows:
            mask, causal = self._causal_rows(rows), False
        result = self.local.call(
            ops.attention.default,
            *tensors[:3],
            mask,
            causal,
            self.facts["scale"],
            self.facts["enable_gqa"],
            self.provider(),
        )
        self.part.count(self.node, self.op_axes, self.choices)
        keys, values_ = (self._held(at) for at in (1, 2))
        self.part.ledger.hold_keys((keys + values_) * self.node.meta["val"].dtype.itemsize)
        return [Value(result, self.op_axes.result_axes[0], self.node.meta["val"].dtype, self.results())]

    def results(self) -> dict[str, int]:
        """The dim of the result that each mesh dimension splits."""
        return {name: choice.results[0] for name, choice in self.choices.items()}

    def provider(self) -> str:
        return "sdpa" if self.part.layout.provider == "auto" else self.part.layout.provider

    def _held(self, at: int) -> int:
        """Elements of an operand on this rank."""
        return math.prod(self.part.sharding.sizes(self.op_axes.operand_axes[at], required(self.choices, at)))

    def coerced(self, at: int) -> fx.Node:
        """An operand on this rank."""
        return self.part.redistribute(
            self.operands[at], self.op_axes.operand_axes[at], required(self.choices, at), self.node, at
        )

    def _causal_rows(self, names: Sequence[str]) -> fx.Node:
        tokens = self.facts["tokens"]
        rows = self.part.sharding.positions(self.op_axes.operand_axes[0][tokens], names)
        columns = np.arange(self.op_axes.operand_axes[1][tokens].size)
        return self.local.constant(torch.from_numpy(columns[None, :] <= rows[:, None]))


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Query heads and key heads that one Ulysses rank computes."""

    queries: tuple[int, int]
    keys: tuple[int, int]

    @staticmethod
    def of(query_heads: int, key_heads: int, ranks: int, index: int) -> _Heads:
        """Query heads go with their key head; with fewer key heads than ranks, key heads are replicated."""
        group = query_heads // key_heads
        if key_heads >= ranks or group == 1:
            keys = share(key_heads, ranks, index)
            return _Heads((keys[0] * group, keys[1] * group), keys)
        queries = share(query_heads, ranks, index)
        return _Heads(queries, (queries[0] // group, -(-queries[1] // group)))

    @property
    def query_count(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def key_count(self) -> int:
        return self.keys[1] - self.keys[0]


class Exchanged(LocalAttention):
    """Attention whose keys lie on all ranks."""

    def __init__(
        self,
        part: LoweringContext,
        node: fx.Node,
        op_axes: OpAxes,
        operands: list[Value],
        choices: dict[str, ShardedLoop],
    ):
        super().__init__(part, node, op_axes, operands, choices)
        mesh = part.layout.mesh
        self.ulysses, self.ring = mesh.size("ulysses"), mesh.size("ring")
        self.u, self.r = mesh.coordinate("ulysses"), mesh.coordinate("ring")
        ranks, tokens = range(part.parts(SEQUENCE)), self.facts["tokens"]
        self.query_axis, self.key_axis = op_axes.operand_axes[0][tokens], op_axes.operand_axes[1][tokens]
        self.query_lengths, self.key_lengths = (
            [len(self.held(axis, index)) for index in ranks] for axis in (self.query_axis, self.key_axis)
        )
        shape, keys, values_ = (self.sizes(at) for at in range(3))
        self.batch = shape[:-3]
        self.query_heads, self.key_heads = (shape[-3], keys[-3]) if len(shape) > 2 else (1, 1)
        self.head_dim, self.value_dim = shape[-1], values_[-1]
        self.dtype = node.meta["val"].dtype

    @property
    def along(self) -> list[str]:
        """The names of what splits the tokens."""
        return [SEQUENCE]

    def sizes(self, at: int) -> list[int]:
        """The shape of an operand as what splits other dims than tokens leaves it."""
        return self.part.sharding.sizes(self.op_axes.operand_axes[at], required(self._others(), at))

    def _others(self) -> dict[str, ShardedLoop]:
        return {name: choice for name, choice in self.choices.items() if name not in self.along}

    def members(self, ring: int) -> list[int]:
        """Sequence ranks of one Ulysses group."""
        mesh = self.part.layout.mesh
        outer = mesh.names.index("ring") < mesh.names.index("ulysses")
        return [ring * self.ulysses + u if outer else u * self.ring + ring for u in range(self.ulysses)]

    def held(self, axis: Axis, index: int) -> np.ndarray:
        """Positions of a token axis that a sequence rank brings to the exchange, in its order."""
        return self.part.sharding.positions(axis, self.along, {SEQUENCE: index})

    def attended(self, ring: int) -> np.ndarray:
        """Positions of the keys that the ranks of one Ulysses group attend to, in the order in which they have them."""
        return np.concatenate([self.held(self.key_axis, i) for i in self.members(ring)])

    def exchanged(self, at: int, rows: fx.Node) -> fx.Node:
        """Keys or values to attend to, from those that the exchange brought: heads of this rank, its group's tokens."""
        return rows

    def heads(self, u: int) -> _Heads:
        return _Heads.of(self.query_heads, self.key_heads, self.ulysses, u)

    def emit(self) -> list[Value]:
        if self.facts["dropout_p"]:
            raise ValueError(f"{self.node.name}: attention with dropout cannot be split")
        tokens = self.facts["tokens"]
        q, k, v = (
            self.part.redistribute(
                self.operands[at], self.op_axes.operand_axes[at], self._required(at, tokens), self.node, at
            )
            for at in range(3)
        )
        if len(self.op_axes.operand_axes[0]) == 2:
            q, k, v = (self.local.call(aten.unsqueeze.default, x, 0) for x in (q, k, v))
        if self.ulysses > 1:
            q, k, v = self._rows_to_heads(q, k, v) if self.regular else self._to_heads(q, k, v)
        k, v = (self._aligned(self.exchanged(at, rows)) for at, rows in ((1, k), (2, v)))
        result = self._attend(q, k, v)
        if self.ulysses > 1:
            result = self._rows_to_tokens(result) if self.regular else self._to_tokens(result)
        if len(self.op_axes.operand_axes[0]) == 2:
            result = self.local.call(aten.squeeze.dim, result, 0)
        self._count()
        return [Value(result, self.op_axes.result_axes[0], self.dtype, self.results())]

    def _required(self, at: int, tokens: int) -> dict[str, int]:
        return {**required(self._others(), at), **dict.fromkeys(self.along, tokens)}

    def _count(self) -> None:
        total = flops(self.node)
        rows = portion(sum(self.query_lengths[i] for i in self.members(self.r)), self.query_axis.size)
        mine = portion(self.heads(self.u).query_count, self.query_heads)
        others = portion(
            math.prod(self.sizes(0)[:-2]), math.prod(axis.size for axis in self.op_axes.operand_axes[0][:-2])
        )
        self.part.ledger.work(total, rows * mine * others, tuple(self.choices))
        tokens = len(self.attended(self.r))
        heads = self.heads(self.u).key_count if self.ulysses > 1 else self.key_heads
        held = math.prod(self.batch) * heads * tokens * (self.head_dim + self.value_dim)
        self.part.ledger.hold_keys(held * self.dtype.itemsize)

    def _flat(self, x: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
        piece = self.local.call(aten.slice.Tensor, x, dim, start, stop)
        return self.local.call(aten.reshape.default, piece, [-1])

    def _exchange(self, packed: fx.Node, sent: list[int], received: list[int]) -> fx.Node:
        """One all-to-all within the Ulysses group of flat pieces, in order of their rank there and here."""
        arrived = self.local.call(
            ops.all_to_all.default, packed, received, sent, self.part.layout.mesh.group("ulysses")
        )
        self.part.ledger.sent("all_to_all", "attention", sum(sent) - sent[self.u], self.dtype)
        return arrived

    def _exchange_pieces(self, pieces: list[fx.Node], sent: list[int], received: list[int]) -> list[fx.Node]:
        """One all-to-all: ``pieces`` flat in order of their rank, back one flat piece per rank."""
        arrived = self._exchange(self.local.call(aten.cat.default, pieces, 0), sent, received)
        split = self.local.call(aten.split_with_sizes.default, arrived, received, 0)
        return [self.local.call(operator.getitem, split, i) for i in range(len(received))]

    @property
    def regular(self) -> bool:
        """Every rank computes equally many heads, and keys lie as queries do."""
        even = self.query_heads % self.ulysses == 0 and self.key_heads % self.ulysses == 0
        return even and self.query_lengths == self.key_lengths

    def _rows_to_heads(self, *tensors: fx.Node) -> list[fx.Node]:
        """``_to_heads`` with tokens outermost in every piece: pieces join in the order they arrive, uneven or not, and
        queries, keys and values are views of them."""
        batch, lengths = math.prod(self.batch), [self.query_lengths[peer] for peer in self.members(self.r)]
        mine, outer = lengths[self.u], len(self.batch)
        heads = [count // self.ulysses for count in (self.query_heads, self.key_heads, self.key_heads)]
        dims = (self.head_dim, self.head_dim, self.value_dim)
        widths = [count * dim for count, dim in zip(heads, dims, strict=True)]
        rows = []
        for x, width in zip(tensors, widths, strict=True):
            x = self.local.call(aten.permute.default, x, [outer + 1, *range(outer + 1), outer + 2])
            x = self.local.call(aten.reshape.default, x, [mine, batch, self.ulysses, width])
            rows.append(self.local.call(aten.permute.default, x, [2, 0, 1, 3]))
        packed = self.local.call(aten.reshape.default, self.local.call(aten.cat.default, rows, 3), [-1])
        row = batch * sum(widths)
        arrived = self._exchange(packed, [mine * row] * self.ulysses, [length * row for length in lengths])
        arrived = self.local.call(aten.reshape.default, arrived, [sum(lengths), *self.batch, sum(widths)])
        parts = self.local.call(aten.split_with_sizes.default, arrived, widths, outer + 1)
        found = []
        for at, (count, dim) in enumerate(zip(heads, dims, strict=True)):
            part = self.local.call(operator.getitem, parts, at)
            part = self.local.call(aten.reshape.default, part, [sum(lengths), *self.batch, count, dim])
            found.append(self.local.call(aten.permute.default, part, [*range(1, outer + 2), 0, outer + 2]))
        return found

    def _rows_to_tokens(self, result: fx.Node) -> fx.Node:
        """``_to_tokens`` with tokens outermost: what attention returns is sent as it lies in memory."""
        lengths, outer = [self.query_lengths[peer] for peer in self.members(self.r)], len(self.batch)
        mine, count = lengths[self.u], self.query_heads // self.ulysses
        rows = self.local.call(aten.permute.default, result, [outer + 1, *range(outer + 1), outer + 2])
        row = math.prod(self.batch) * count * self.value_dim
        packed = self.local.call(aten.reshape.default, rows, [-1])
        arrived = self._exchange(packed, [length * row for length in lengths], [mine * row] * self.ulysses)
        shape = [self.ulysses, mine, *self.batch, count, self.value_dim]
        arrived = self.local.call(aten.reshape.default, arrived, shape)
        order = [*range(2, outer + 2), 1, 0, outer + 2, outer + 3]
        arrived = self.local.call(aten.permute.default, arrived, order)
        whole = [*self.batch, mine, self.query_heads, self.value_dim]
        arrived = self.local.call(aten.reshape.default, arrived, whole)
        return self.local.call(aten.permute.default, arrived, [*range(outer), outer + 1, outer, outer + 2])

    def _to_heads(self, q: fx.Node, k: fx.Node, v: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
        batch, me = math.prod(self.batch), self.part.sharding.index[SEQUENCE]
        dims = (self.head_dim, self.head_dim, self.value_dim)
        rank = len(self.batch) + 3
        pieces, sent, received, shapes = [], [], [], []
        for u, peer in enumerate(self.members(self.r)):
            there, here = self.heads(u), self.heads(self.u)
            ranges = (there.queries, there.keys, there.keys)
            pieces += [self._flat(x, rank - 3, *heads) for x, heads in zip((q, k, v), ranges, strict=True)]
            outgoing = (self.query_lengths[me], self.key_lengths[me], self.key_lengths[me])
            sent.append(sum(batch * (b - a) * n * d for (a, b), n, d in zip(ranges, outgoing, dims, strict=True)))
            counts = (here.query_count, here.key_count, here.key_count)
            incoming = (self.query_lengths[peer], self.key_lengths[peer], self.key_lengths[peer])
            shapes.append([[*self.batch, c, n, d] for c, n, d in zip(counts, incoming, dims, strict=True)])
            received.append(sum(math.prod(shape) for shape in shapes[-1]))
        arrived = self._exchange_pieces(pieces, sent, received)
        unpacked = [self._unpack(flat, shape) for flat, shape in zip(arrived, shapes, strict=True)]
        joined = [self.local.call(aten.cat.default, [parts[i] for parts in unpacked], rank - 2) for i in range(3)]
        return joined[0], joined[1], joined[2]

    def _unpack(self, flat: fx.Node, shapes: Sequence[Sequence[int]]) -> list[fx.Node]:
        parts, at = [], 0
        for shape in shapes:
            size = math.prod(shape)
            piece = self.local.call(aten.slice.Tensor, flat, 0, at, at + size)
            parts.append(self.local.call(aten.reshape.default, piece, list(shape)))
            at += size
        return parts

    def _to_tokens(self, result: fx.Node) -> fx.Node:
        batch, me = math.prod(self.batch), self.part.sharding.index[SEQUENCE]
        rank = len(self.batch) + 3
        pieces, sent, received, shapes, at = [], [], [], [], 0
        for u, peer in enumerate(self.members(self.r)):
            pieces.append(self._flat(result, rank - 2, at, at + self.query_lengths[peer]))
            at += self.query_lengths[peer]
            sent.append(batch * self.heads(self.u).query_count * self.query_lengths[peer] * self.value_dim)
            shapes.append([*self.batch, self.heads(u).query_count, self.query_lengths[me], self.value_dim])
            received.append(math.prod(shapes[-1]))
        arrived = self._exchange_pieces(pieces, sent, received)
        parts = [self.local.call(aten.reshape.default, x, shape) for x, shape in zip(arrived, shapes, strict=True)]
        return self.local.call(aten.cat.default, parts, rank - 3)

    def _aligned(self, x: fx.Node) -> fx.Node:
        """Key heads repeated so that they stand one to one with query heads, where whole groups were torn apart."""
        group = self.query_heads // self.key_heads
        mine = self.heads(self.u)
        if self.ulysses == 1 or group == 1 or mine.query_count == mine.key_count * group:
            return x
        wanted = np.arange(*mine.queries) // group - mine.keys[0]
        index = self.local.constant(torch.from_numpy(wanted))
        return self.local.call(aten.index_select.default, x, len(self.batch), index)

    def _grouped(self) -> bool:
        mine = self.heads(self.u)
        whole = mine.query_count == mine.key_count * (self.query_heads // self.key_heads)
        return self.facts["enable_gqa"] and (self.ulysses == 1 or whole)

    def _attend(self, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
        mask = self._mask()
        scale = self.facts["scale"]
        if self.ring == 1:
            return self.local.call(ops.attention.default, q, k, v, mask, False, scale, self._grouped(), self.provider())
        lengths = [len(self.attended(r)) for r in range(self.ring)]
        heads = self.heads(self.u) if self.ulysses > 1 else _Heads((0, self.query_heads), (0, self.key_heads))
        count = heads.key_count if self._grouped() or self.query_heads == self.key_heads else heads.query_count
        elements = math.prod(self.batch) * count * (self.head_dim + self.value_dim)
        sent = sum(lengths[(self.r - step) % self.ring] for step in range(self.ring - 1)) * elements
        self.part.ledger.sent("ring_attention", "attention", sent, self.dtype)
        group = self.part.layout.mesh.group("ring")
        provider = self.part.layout.provider
        return self.local.call(
            ops.ring_attention.default, q, k, v, mask, lengths, scale, self._grouped(), group, provider
        )

    def _mask(self) -> fx.Node | None:
        """The mask of this rank's heads and queries, its columns in the order in which keys arrive."""
        rows = np.concatenate([self.held(self.query_axis, i) for i in self.members(self.r)])
        columns = np.concatenate([self.attended(r) for r in range(self.ring)])
        if self.facts["is_causal"]:
            return self.local.constant(torch.from_numpy(columns[None, :] <= rows[:, None]))
        at = self.facts["mask"]
        if at is None:
            return None
        mask = self.part.redistribute(
            self.operands[at], self.op_axes.operand_axes[at], required(self._others(), at), self.node, at
        )
        shape = self.sizes(at)
        wanted = {-1: columns, -2: rows, -3: np.arange(*self.heads(self.u).queries) if self.ulysses > 1 else None}
        for back, positions in wanted.items():
            if positions is not None and len(shape) >= -back and shape[back] > 1:
                mask = self.local.take(mask, len(shape) + back, positions, shape[back])
        if len(self.op_axes.operand_axes[0]) == 2 and len(shape) > 2:
            raise ValueError(f"{self.node.name}: a mask of more dims than its queries")
        return mask
