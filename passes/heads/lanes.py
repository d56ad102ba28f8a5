"""Of which lanes of a normalized head each lane of a value is made: the algebra that rotary embeddings are read with.

Lanes are the last dims of a value, which has batch, tokens and maybe heads in front of them. Operators that move lanes
are run on the numbers of the lanes, so there is no list of the ways to write a rotation. Values of several streams of
tokens lie one after the other as stretches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

Move = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""An operator on the lanes of some values."""


@dataclasses.dataclass(frozen=True)
class Term:
    """A summand of each lane: ``sign * source lane``, times a lane of a table if there is one.

    Args:
        source: number of the lane of the norm; -1 where there is nothing.
        sign: 1 or -1.
        table: number of the table; -1 for none.
        lane: which of its lanes.
    """

    source: torch.Tensor
    sign: torch.Tensor
    table: torch.Tensor
    lane: torch.Tensor

    @classmethod
    def own(cls, lanes: Sequence[int]) -> Term:
        """Each lane itself."""
        numbers = torch.arange(torch.Size(lanes).numel()).reshape(*lanes)
        none = torch.full_like(numbers, -1)
        return cls(numbers, torch.ones_like(numbers), none, none)

    @classmethod
    def nothing(cls, lanes: Sequence[int]) -> Term:
        """Lanes without a value."""
        none = torch.full(tuple(lanes), -1)
        return cls(none, none.neg(), none, none)

    def each(self) -> tuple[torch.Tensor, ...]:
        return self.source, self.sign, self.table, self.lane


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Some tokens of one norm.

    Args:
        norm: the norm's node.
        start, stop: which of its tokens.
        row: the row of the tables that the first of them is multiplied with; None before that.
        terms: what each lane is the sum of.
    """

    norm: fx.Node
    start: int
    stop: int
    terms: tuple[Term, ...]
    row: int | None = None

    @property
    def count(self) -> int:
        """How many tokens."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Heads:
    """A value made of normalized heads.

    Args:
        lead: what its first dims are: batch ``b``, tokens ``t``, heads ``h`` if they do not count as lanes.
        stretches: its tokens in order.
    """

    lead: str
    stretches: tuple[Stretch, ...]

    @property
    def lanes(self) -> tuple[int, ...]:
        """The sizes of the dims after the first ones."""
        return tuple(self.stretches[0].terms[0].source.shape)

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(stretch.count for stretch in self.stretches)

    def between(self, start: int, stop: int) -> Heads | None:
        """Some of the tokens; None for none."""
        some, offset = [], 0
        for each in self.stretches:
            first, last = max(start - offset, 0), min(stop - offset, each.count)
            if first < last:
                row = None if each.row is None else each.row + first
                some.append(dataclasses.replace(each, start=each.start + first, stop=each.start + last, row=row))
            offset += each.count
        return Heads(self.lead, tuple(some)) if some else None

    def with_terms(self, change: Callable[[Stretch], tuple[Term, ...]]) -> Heads:
        """The same tokens with other lanes."""
        changed = tuple(dataclasses.replace(each, terms=change(each)) for each in self.stretches)
        return dataclasses.replace(self, stretches=changed)


def moved(values: Sequence[Heads], move: Move) -> Heads | None:
    """The lanes of some values moved by an operator; None where they are not of the same tokens, or sums of others."""
    first = values[0]
    if any(not _alike(first, other) for other in values):
        return None
    stretches = []
    for same in zip(*(value.stretches for value in values), strict=True):
        terms = []
        for term in zip(*(each.terms for each in same), strict=True):
            terms.append(Term(*(move(part) for part in zip(*(each.each() for each in term), strict=True))))
        rows = {each.row for each in same if each.row is not None}
        stretches.append(dataclasses.replace(same[0], terms=tuple(terms), row=rows.pop() if rows else None))
    return Heads(first.lead, tuple(stretches))


def _alike(one: Heads, other: Heads) -> bool:
    """Whether two values are of the same tokens of the same norms, and sums of as many lanes."""
    return one.lead == other.lead and len(one.stretches) == len(other.stretches) and all(
        (a.norm, a.start, a.stop, len(a.terms)) == (b.norm, b.start, b.stop, len(b.terms)) and _rows_agree(a, b)
        for a, b in zip(one.stretches, other.stretches, strict=True)
    )  # fmt: skip


def _rows_agree(one: Stretch, other: Stretch) -> bool:
    return one.row is None or other.row is None or one.row == other.row


def added(one: Heads, other: Heads, sign: int) -> Heads | None:
    """The sum of two values of the same tokens, or the difference with -1 as the sign."""
    same = [dataclasses.replace(each, terms=each.terms[:1]) for each in one.stretches]
    rest = [dataclasses.replace(each, terms=each.terms[:1]) for each in other.stretches]
    if one.lanes != other.lanes or not _alike(Heads(one.lead, tuple(same)), Heads(other.lead, tuple(rest))):
        return None
    stretches = []
    for a, b in zip(one.stretches, other.stretches, strict=True):
        terms = (*a.terms, *(dataclasses.replace(term, sign=term.sign * sign) for term in b.terms))
        stretches.append(dataclasses.replace(a, terms=terms, row=b.row if a.row is None else a.row))
    return Heads(one.lead, tuple(stretches))


def multiplied(value: Heads, number: int, table: torch.Tensor) -> Heads | None:
    """A value times a table of numbers for each token and lane; None where the table is no such one.

    Args:
        number: that the table goes by.
        table: of the shape in which it is multiplied.
    """
    lead, lanes = value.lead, value.lanes
    sizes = [1] * (len(lead) + len(lanes) - table.dim()) + list(table.shape)
    if len(sizes) != len(lead) + len(lanes) or sizes[lead.index("t")] != value.tokens:
        return None
    if "h" in lead and sizes[lead.index("h")] != 1:
        return None
    inner = sizes[len(lead) :]
    if any(size not in (1, lane) for size, lane in zip(inner, lanes, strict=True)):
        return None
    numbers = torch.arange(torch.Size(inner).numel()).reshape(inner).expand(lanes)
    stretches, row = [], 0
    for each in value.stretches:
        if any((term.table >= 0).any() for term in each.terms):
            return None
        terms = tuple(Term(term.source, term.sign, torch.full_like(numbers, number), numbers) for term in each.terms)
        stretches.append(dataclasses.replace(each, terms=terms, row=row))
        row += each.count
    return Heads(lead, tuple(stretches))


def joined(values: Sequence[Heads]) -> Heads | None:
    """Values one after the other along the tokens."""
    if any(value.lead != values[0].lead or value.lanes != values[0].lanes for value in values):
        return None
    return Heads(values[0].lead, tuple(stretch for value in values for stretch in value.stretches))


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What a stretch's lanes turn out to be: themselves, or pairs turned by an angle.

    Args:
        cos, sin: numbers of the tables; None where nothing is turned.
        halves: whether a pair is a lane of the first half and one of the second, or two neighbours.
        compact: whether tables have one lane for each pair.
    """

    cos: int | None = None
    sin: int | None = None
    halves: bool = False
    compact: bool = False


def rotation_of(terms: Sequence[Term], width: int) -> Rotation | None:
    """The rotation that terms are, of heads of so many lanes; None where they are something else."""
    flat = [Term(*(part.reshape(-1) for part in term.each())) for term in terms]
    same = torch.arange(flat[0].source.numel())
    if len(flat) == 1:
        term = flat[0]
        plain = term.source.equal(same) and bool((term.table < 0).all()) and bool((term.sign == 1).all())
        return Rotation() if plain else None
    if len(flat) != 2:
        return None
    near = flat[0].source == same
    if not bool((near | (flat[1].source == same)).all()):
        return None
    kept, turned = (Term(*(torch.where(near, a, b) for a, b in pairs)) for pairs in _both(flat))
    for halves in (False, True):
        rotation = _turned(kept, turned, same, width, halves)
        if rotation is not None:
            return rotation
    return None


def _both(terms: Sequence[Term]) -> tuple[list[Any], list[Any]]:
    first, second = (term.each() for term in terms)
    return list(zip(first, second, strict=True)), list(zip(second, first, strict=True))


def _turned(kept: Term, turned: Term, same: torch.Tensor, width: int, halves: bool) -> Rotation | None:
    inside = same % width
    second = inside >= width // 2 if halves else inside % 2 == 1
    step = width // 2 if halves else 1
    pair = inside % (width // 2) if halves else inside // 2
    if not turned.source.equal(torch.where(second, same - step, same + step)):
        return None
    if not bool((kept.sign == 1).all()) or not turned.sign.equal(torch.where(second, 1, -1)):
        return None
    tables = [term.table.unique().tolist() for term in (kept, turned)]
    if any(len(each) != 1 or each[0] < 0 for each in tables):
        return None
    for compact, lane in ((False, inside), (True, pair)):
        if kept.lane.equal(lane) and turned.lane.equal(lane):
            return Rotation(tables[0][0], tables[1][0], halves, compact)
    return None
