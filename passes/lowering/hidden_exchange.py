"""Ulysses' all-to-alls while something else is computed: values leave first, results return in two halves.

The values of this rank's tokens leave in an all-to-all of their own before its queries and keys are computed, which
follow in one. Attention is computed for half of this rank's heads at a time, and the first half of the result returns
while the second is computed. That costs up to two all-to-alls more, one attention more, and a product of its own for
values (`passes.fuse.join_linears`), so it is done where a link is slow enough for the shape to gain by it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from torch import fx

import xdit_compile.kernels.collectives  # noqa: F401  (registers the ops that the graph calls)

from .ulysses import HeadExchange

LATENCY_S = 50e-6
"""What one more all-to-all is taken to cost, beside its bytes: launching it and what feeds it, and meeting the others.

A figure of ours that nobody measured: a collective of few bytes between the GPUs of one host takes some tens of
microseconds, and the products and the attention that are taken apart launch a few kernels more."""


@dataclasses.dataclass(frozen=True)
class Begun:
    """A collective that is under way: where it arrives, and what was sent."""

    arriving: fx.Node
    sent: fx.Node


@dataclasses.dataclass(frozen=True)
class Hiding:
    """What of an attention's exchange is hidden; the same on all ranks of its group.

    Args:
        values: they leave before queries and keys.
        heads: this rank's query heads whose results return first, and the key heads that these attend to; None where
            all return at once.
    """

    values: bool
    heads: tuple[int, int] | None


def choose(exchange: HeadExchange, link: float | None) -> Hiding | None:
    """What to hide, by a plain model: bytes over the link must take longer than `LATENCY_S`, which hiding them costs.

    The bytes are those of the rank that sends most, so that all ranks of the group choose alike.

    Args:
        link: bytes per second that leave a rank for the others; None hides nothing.

    Returns:
        None where nothing is hidden: without a link, on one rank, or where ranks compute different numbers of heads.
    """
    if link is None or exchange.ranks == 1 or not exchange.regular:
        return None
    _, _, values = exchange.lines
    queries, lengths, item = exchange.lines[0].heads, exchange.query_lengths, exchange.dtype.itemsize
    token = math.prod(exchange.batch) * exchange.value_dim * item
    most_values = max(lengths) * (exchange.ranks - 1) * token * values.heads
    heads = _first(queries, values.heads)
    most_results = (sum(lengths) - min(lengths)) * token * (heads[0] if heads else 0)
    ahead, halves = (size / link > LATENCY_S for size in (most_values, most_results))
    return Hiding(ahead, heads if halves else None) if ahead or halves else None


def _first(queries: int, keys: int) -> tuple[int, int] | None:
    """The larger half of the query heads with the key heads that they attend to; None where there is one alone.

    Whole groups of query heads stay together, but for one key head, to which both halves attend.
    """
    if keys > 1:
        return (keys - keys // 2) * (queries // keys), keys - keys // 2
    return (queries - queries // 2, keys) if queries > 1 else None


@dataclasses.dataclass(frozen=True)
class HiddenExchange:
    """The exchange of one attention, of which a part is hidden."""

    exchange: HeadExchange
    hiding: Hiding

    def to_heads(self, v: fx.Node, others: Callable[[], tuple[fx.Node, fx.Node]]) -> list[fx.Node]:
        """Queries, keys and values [..., H, t, c] of this rank's tokens to [..., h, T, c] of its heads.

        Args:
            v: the values.
            others: gives queries and keys, once values are on their way.
        """
        exchange, (queries, keys, values) = self.exchange, self.exchange.lines
        if not self.hiding.values:
            return exchange.to_heads(*others(), v)
        packed, sent, received = exchange.packed([v], [values])
        ahead = Begun(exchange.begin(packed, sent, received, hidden=True), packed)
        packed, *splits = exchange.packed(others(), [queries, keys])
        q, k = exchange.attended(exchange.at_once(packed, *splits), [queries, keys])
        return [q, k, *exchange.attended(self._end(ahead), [values])]

    def to_tokens(self, attend: Callable[[slice, slice], fx.Node]) -> fx.Node:
        """The result [..., H, t, c] of this rank's tokens.

        Args:
            attend: computes the result [..., h, T, c] of some of this rank's query heads, which attend to some of its
                key heads.
        """
        exchange = self.exchange
        queries, keys = exchange.lines[0].heads, exchange.lines[1].heads
        if self.hiding.heads is None:
            return exchange.to_tokens(attend(slice(0, queries), slice(0, keys)))
        first, first_keys = self.hiding.heads
        second_keys = slice(first_keys if keys > 1 else 0, keys)
        halves = [(slice(0, first), slice(0, first_keys)), (slice(first, queries), second_keys)]
        begun = []
        for which, (heads, of_keys) in enumerate(halves):
            packed, sent, received = exchange.packed_result(attend(heads, of_keys), heads.stop - heads.start)
            begun.append(Begun(exchange.begin(packed, sent, received, hidden=which == 0), packed))
        parts = [
            exchange.by_token(self._end(each), heads.stop - heads.start)
            for each, (heads, _) in zip(begun, halves, strict=True)
        ]
        return exchange.whole(exchange.side_by_side(parts))

    def _end(self, begun: Begun) -> fx.Node:
        return self.exchange.end(begun.arriving, begun.sent)
