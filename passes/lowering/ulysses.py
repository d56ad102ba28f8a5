"""Ulysses: the all-to-alls that exchange tokens for heads and back (arXiv:2309.14509).

Before attention a rank holds some tokens of all heads, afterwards some heads of all tokens of its group; queries, keys
and values travel in one all-to-all. In the shapes below ``t`` are the tokens of this rank, ``T`` those of the group,
``H`` all heads, ``h`` those of one rank, ``c`` channels of a head, ``U`` the ranks of the group; ``...`` is the batch.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence

import torch
from torch import fx

from xdit_compile.ir.sharding import share
from xdit_compile.passes.local.ledger import Ledger
from xdit_compile.passes.local.local_graph import LocalGraph, aten

ops = torch.ops.xdit_compile


@dataclasses.dataclass(frozen=True)
class Heads:
    """Query heads and key heads, each from start to stop, that one rank computes."""

    queries: tuple[int, int]
    keys: tuple[int, int]

    @staticmethod
    def of(query_heads: int, key_heads: int, ranks: int, index: int) -> Heads:
        """The heads of rank ``index`` of a group of so many ranks.

        Query heads go with their key head; with fewer key heads than ranks, key heads are replicated.
        """
        group = query_heads // key_heads
        if key_heads >= ranks or group == 1:
            keys = share(key_heads, ranks, index)
            return Heads((keys[0] * group, keys[1] * group), keys)
        queries = share(query_heads, ranks, index)
        return Heads(queries, (queries[0] // group, -(-queries[1] // group)))

    @property
    def query_count(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def key_count(self) -> int:
        return self.keys[1] - self.keys[0]


@dataclasses.dataclass(frozen=True)
class Line:
    """So many heads of so many channels."""

    heads: int
    dim: int

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.dim


@dataclasses.dataclass(frozen=True)
class HeadExchange:
    """The exchange of one attention within one group, added to a rank's graph.

    Args:
        group: the process group; this rank is number ``index`` of it.
        batch: sizes of the dims before heads.
        head_dim, value_dim: channels of a head of queries and keys, and of values.
        query_lengths, key_lengths: tokens that each rank of the group brings, in its order.
    """

    local: LocalGraph
    ledger: Ledger
    group: str
    index: int
    dtype: torch.dtype
    batch: Sequence[int]
    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    query_lengths: Sequence[int]
    key_lengths: Sequence[int]

    @property
    def ranks(self) -> int:
        return len(self.query_lengths)

    def heads(self, index: int) -> Heads:
        """The heads that a rank of the group computes."""
        if self.ranks == 1:
            return Heads((0, self.query_heads), (0, self.key_heads))
        return Heads.of(self.query_heads, self.key_heads, self.ranks, index)

    def to_heads(self, q: fx.Node, k: fx.Node, v: fx.Node) -> list[fx.Node]:
        """Queries, keys and values [..., H, t, c] of this rank's tokens to [..., h, T, c] of its heads."""
        if self.ranks == 1:
            return [q, k, v]
        return self._rows_to_heads(q, k, v) if self.regular else self._pieces_to_heads(q, k, v)

    def to_tokens(self, result: fx.Node) -> fx.Node:
        """The result [..., h, T, c] of this rank's heads to [..., H, t, c] of its tokens."""
        if self.ranks == 1:
            return result
        return self._rows_to_tokens(result) if self.regular else self._pieces_to_tokens(result)

    @property
    def regular(self) -> bool:
        """Every rank computes equally many heads, and keys lie as queries do."""
        even = self.query_heads % self.ranks == 0 and self.key_heads % self.ranks == 0
        return even and list(self.query_lengths) == list(self.key_lengths)

    @property
    def lines(self) -> tuple[Line, Line, Line]:
        """What this rank attends with, of queries, keys and values, where all ranks compute equally many heads."""
        queries, keys = self.query_heads // self.ranks, self.key_heads // self.ranks
        return Line(queries, self.head_dim), Line(keys, self.head_dim), Line(keys, self.value_dim)

    def _rows_to_heads(self, *tensors: fx.Node) -> list[fx.Node]:
        packed, *splits = self.packed(tensors, self.lines)
        return self.attended(self.at_once(packed, *splits), self.lines)

    def packed(self, tensors: Sequence[fx.Node], lines: Sequence[Line]) -> tuple[fx.Node, list[int], list[int]]:
        """Tensors [..., H, t, c] as they are sent in one piece, and the elements that go to and come from every rank.

        Tokens are outermost in every piece: pieces join in the order they arrive, uneven or not.
        """
        call, batch, lengths = self.local.call, math.prod(self.batch), self.query_lengths
        mine, outer = lengths[self.index], len(self.batch)
        rows = []
        for tensor, line in zip(tensors, lines, strict=True):  # [..., H, t, c]
            tensor = call(aten.permute.default, tensor, [outer + 1, *range(outer + 1), outer + 2])  # [t, ..., H, c]
            tensor = call(aten.reshape.default, tensor, [mine, batch, self.ranks, line.width])  # [t, batch, U, h c]
            rows.append(call(aten.permute.default, tensor, [2, 0, 1, 3]))  # [U, t, batch, h c]
        joined = call(aten.cat.default, rows, 3) if len(rows) > 1 else rows[0]  # [U, t, batch, h c of all]
        row = batch * sum(line.width for line in lines)
        sent, received = [mine * row] * self.ranks, [length * row for length in lengths]
        return call(aten.reshape.default, joined, [-1]), sent, received

    def attended(self, incoming: fx.Node, lines: Sequence[Line]) -> list[fx.Node]:
        """Views [..., h, T, c] of what came of tensors that were sent as `packed` has them."""
        call, total, outer, widths = self.local.call, sum(self.query_lengths), len(self.batch), [e.width for e in lines]
        incoming = call(aten.reshape.default, incoming, [total, *self.batch, sum(widths)])  # [T, ..., h c of all]
        split = call(aten.split_with_sizes.default, incoming, widths, outer + 1) if len(lines) > 1 else None
        views = []
        for position, line in enumerate(lines):
            tensor = incoming if split is None else call(operator.getitem, split, position)  # [T, ..., h c]
            tensor = call(aten.reshape.default, tensor, [total, *self.batch, line.heads, line.dim])  # [T, ..., h, c]
            order = [*range(1, outer + 2), 0, outer + 2]
            views.append(call(aten.permute.default, tensor, order))  # [..., h, T, c]
        return views

    def _rows_to_tokens(self, result: fx.Node) -> fx.Node:
        count = self.query_heads // self.ranks
        packed, *splits = self.packed_result(result, count)
        incoming = self.by_token(self.at_once(packed, *splits), count)
        return self.whole(incoming)

    def packed_result(self, result: fx.Node, heads: int) -> tuple[fx.Node, list[int], list[int]]:
        """A result [..., h, T, c] of some heads as it is sent, and the elements that go to and come from every rank.

        Tokens are outermost in every piece: what attention returns is sent as it lies in memory.
        """
        call, lengths, outer = self.local.call, self.query_lengths, len(self.batch)
        rows = call(aten.permute.default, result, [outer + 1, *range(outer + 1), outer + 2])  # [T, ..., h, c]
        row = math.prod(self.batch) * heads * self.value_dim
        sent, received = [length * row for length in lengths], [lengths[self.index] * row] * self.ranks
        return call(aten.reshape.default, rows, [-1]), sent, received

    def by_token(self, incoming: fx.Node, heads: int) -> fx.Node:
        """What came of a result that was sent as `packed_result` has it, as a view [..., t, U, h, c]."""
        call, outer = self.local.call, len(self.batch)
        shape = [self.ranks, self.query_lengths[self.index], *self.batch, heads, self.value_dim]
        incoming = call(aten.reshape.default, incoming, shape)  # [U, t, ..., h, c]
        order = [*range(2, outer + 2), 1, 0, outer + 2, outer + 3]
        return call(aten.permute.default, incoming, order)

    def side_by_side(self, parts: Sequence[fx.Node]) -> fx.Node:
        """Parts [..., t, U, h, c] of a result, each of other heads of every rank, as one."""
        return self.local.call(aten.cat.default, list(parts), len(self.batch) + 2)

    def whole(self, result: fx.Node) -> fx.Node:
        """A result [..., t, U, h, c] as [..., H, t, c]."""
        call, outer = self.local.call, len(self.batch)
        shape = [*self.batch, self.query_lengths[self.index], self.query_heads, self.value_dim]
        result = call(aten.reshape.default, result, shape)  # [..., t, H, c]
        return call(aten.permute.default, result, [*range(outer), outer + 1, outer, outer + 2])  # [..., H, t, c]

    def _pieces_to_heads(self, *tensors: fx.Node) -> list[fx.Node]:
        """A flat piece [..., h, t, c] of queries, keys and values for every rank, since ``h`` differs from rank to rank
        or keys lie otherwise than queries."""
        batch, heads_dim, here = math.prod(self.batch), len(self.batch), self.heads(self.index)
        dims = (self.head_dim, self.head_dim, self.value_dim)
        mine = self._lengths(self.index)
        pieces, sent, received, shapes = [], [], [], []
        for index in range(self.ranks):
            there = self.heads(index)
            ranges = (there.queries, there.keys, there.keys)
            pieces += [self._flat(x, heads_dim, *bounds) for x, bounds in zip(tensors, ranges, strict=True)]
            sent.append(sum(batch * (b - a) * n * c for (a, b), n, c in zip(ranges, mine, dims, strict=True)))
            counts = (here.query_count, here.key_count, here.key_count)
            theirs = self._lengths(index)
            shapes.append([[*self.batch, h, t, c] for h, t, c in zip(counts, theirs, dims, strict=True)])
            received.append(sum(math.prod(shape) for shape in shapes[-1]))
        incoming = self._exchange_pieces(pieces, sent, received)
        unpacked = [self._unpack(flat, shape) for flat, shape in zip(incoming, shapes, strict=True)]
        return [self.local.call(aten.cat.default, [parts[i] for parts in unpacked], heads_dim + 1) for i in range(3)]

    def _pieces_to_tokens(self, result: fx.Node) -> fx.Node:
        """A flat piece [..., h, t, c] for every rank, which joins them along heads to [..., H, t, c]."""
        batch, heads_dim, here = math.prod(self.batch), len(self.batch), self.heads(self.index)
        pieces, sent, received, shapes, start = [], [], [], [], 0
        for index, length in enumerate(self.query_lengths):
            pieces.append(self._flat(result, heads_dim + 1, start, start + length))
            start += length
            sent.append(batch * here.query_count * length * self.value_dim)
            shapes.append([*self.batch, self.heads(index).query_count, self.query_lengths[self.index], self.value_dim])
            received.append(math.prod(shapes[-1]))
        incoming = self._exchange_pieces(pieces, sent, received)
        parts = [self.local.call(aten.reshape.default, x, shape) for x, shape in zip(incoming, shapes, strict=True)]
        return self.local.call(aten.cat.default, parts, heads_dim)

    def _lengths(self, index: int) -> tuple[int, int, int]:
        """Tokens of queries, keys and values that a rank of the group brings."""
        return self.query_lengths[index], self.key_lengths[index], self.key_lengths[index]

    def _flat(self, tensor: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
        piece = self.local.call(aten.slice.Tensor, tensor, dim, start, stop)
        return self.local.call(aten.reshape.default, piece, [-1])

    def _unpack(self, flat: fx.Node, shapes: Sequence[Sequence[int]]) -> list[fx.Node]:
        """Tensors of these shapes that lie one after the other in a flat one."""
        tensors, start = [], 0
        for shape in shapes:
            size = math.prod(shape)
            piece = self.local.call(aten.slice.Tensor, flat, 0, start, start + size)
            tensors.append(self.local.call(aten.reshape.default, piece, list(shape)))
            start += size
        return tensors

    def at_once(self, packed: fx.Node, sent: list[int], received: list[int]) -> fx.Node:
        """One all-to-all of flat pieces, in order of their rank there and here."""
        incoming = self.local.call(ops.all_to_all.default, packed, received, sent, self.group)
        self.ledger.sent("all_to_all", "attention", sum(sent) - sent[self.index], self.dtype)
        return incoming

    def begin(self, packed: fx.Node, sent: list[int], received: list[int], hidden: bool) -> fx.Node:
        """The same, begun; `end` gives what came.

        Args:
            hidden: whether anything is computed before that.
        """
        arriving = self.local.call(ops.all_to_all_start.default, packed, received, sent, self.group)
        self.ledger.sent("all_to_all_start", "attention", sum(sent) - sent[self.index], self.dtype, hidden)
        return arriving

    def end(self, arriving: fx.Node, packed: fx.Node) -> fx.Node:
        """What came of `packed`, once it is there."""
        return self.local.call(ops.all_to_all_finish.default, arriving, packed, self.group)

    def _exchange_pieces(self, pieces: list[fx.Node], sent: list[int], received: list[int]) -> list[fx.Node]:
        """One all-to-all: ``pieces`` flat in order of their rank, back one flat piece per rank."""
        incoming = self.at_once(self.local.call(aten.cat.default, pieces, 0), sent, received)
        split = self.local.call(aten.split_with_sizes.default, incoming, received, 0)
        return [self.local.call(operator.getitem, split, index) for index in range(len(received))]
