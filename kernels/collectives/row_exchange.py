"""Rows that ranks hold of one dim, and those that each asks the others for."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

Rows = tuple[int, int]
"""The first row and the one past the last."""


@dataclasses.dataclass(frozen=True)
class RowExchange:
    """Rows are counted over all ranks, one after the other in group order.

    Args:
        dim: where rows are counted.
        starts, stops: the first row that each rank asks for and the one past its last; a rank for which they are equal
            gets none.
        sizes: each rank's rows; zero is legal.
        index: this rank's position in the group.
        group: process group; empty for this rank alone.
    """

    dim: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    sizes: tuple[int, ...]
    index: int
    group: str = ""

    @classmethod
    def of(
        cls, dim: int, starts: Iterable[int], stops: Iterable[int], sizes: Iterable[int], index: int, group: str = ""
    ) -> RowExchange:
        """The same, of any sequences."""
        return cls(dim, tuple(starts), tuple(stops), tuple(sizes), index, group)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the ops of an exchange take, in order."""
        return self.dim, list(self.starts), list(self.stops), list(self.sizes), self.index, self.group

    @property
    def own(self) -> Rows:
        """This rank's rows."""
        return self.of_rank(self.index)

    @property
    def wanted(self) -> Rows:
        """The rows that this rank asks for."""
        return self.starts[self.index], self.stops[self.index]

    @property
    def sent(self) -> list[Rows]:
        """The rows of this rank that go to each rank, none to itself."""
        own, rows = self.own, zip(self.starts, self.stops, strict=True)
        return [_overlap(own, each) if rank != self.index else (0, 0) for rank, each in enumerate(rows)]

    @property
    def got(self) -> list[Rows]:
        """The rows that come to this rank from each rank, none from itself."""
        ranks = range(len(self.sizes))
        return [_overlap(self.of_rank(rank), self.wanted) if rank != self.index else (0, 0) for rank in ranks]

    @property
    def whole(self) -> bool:
        """Whether every rank wants everything, so that nobody has to send one thing to each; the same on every rank."""
        return not any(self.starts) and set(self.stops) == {sum(self.sizes)}

    def of_rank(self, rank: int) -> Rows:
        """The rows of one rank."""
        ends = [0, *itertools.accumulate(self.sizes)]
        return ends[rank], ends[rank + 1]

    def elements_sent(self, shape: Sequence[int]) -> int:
        """How many elements leave this rank, of a tensor of this shape but for its rows."""
        return count(self.sent) * row_of(shape, self.dim)

    def checked(self, x: torch.Tensor) -> RowExchange:
        """The same with ``dim`` counted from the front, for the shard ``x`` of this rank.

        Raises:
            ValueError: when ``x`` has not this rank's rows, or rows beyond the ends are asked for.
        """
        sizes = self.sizes
        if not -x.dim() <= self.dim < x.dim():
            raise ValueError(f"halo_exchange along dim {self.dim} of a tensor with {x.dim()} dims")
        if not 0 <= self.index < len(sizes) or x.shape[self.dim] != sizes[self.index]:
            raise ValueError(
                f"halo_exchange of {x.shape[self.dim]} rows at position {self.index} where the ranks have {list(sizes)}"
            )
        if not len(self.starts) == len(self.stops) == len(sizes):
            raise ValueError(f"halo_exchange over {len(sizes)} ranks needs as many starts and stops")
        if any(not 0 <= a <= b <= sum(sizes) for a, b in zip(self.starts, self.stops, strict=True)):
            raise ValueError(
                f"halo_exchange of rows {list(self.starts)} to {list(self.stops)} where there are {sum(sizes)}"
            )
        return dataclasses.replace(self, dim=self.dim % x.dim())

    def packed(self, x: torch.Tensor) -> tuple[torch.Tensor, list[int], list[int]]:
        """What ``all_to_all`` is given: the rows of ``x`` that leave this rank, flat, and the splits both ways."""
        row, (start, _), sent = row_of(x.shape, self.dim), self.own, self.sent
        splits = [(b - a) * row for a, b in sent]
        away = x.new_empty(sum(splits))
        for piece, (a, b) in zip(away.split(splits), sent, strict=True):
            if b > a:
                rows = x.narrow(self.dim, a - start, b - a)
                piece.view(rows.shape).copy_(rows)
        return away, [(b - a) * row for a, b in self.got], splits

    def joined(self, x: torch.Tensor, arrived: torch.Tensor) -> torch.Tensor:
        """The rows that this rank asked for, from its own and those that ``all_to_all`` brought."""
        row, got, dim = row_of(x.shape, self.dim), self.got, self.dim
        parts = [
            part.view(*x.shape[:dim], b - a, *x.shape[dim + 1 :])
            for part, (a, b) in zip(arrived.split([(b - a) * row for a, b in got]), got, strict=True)
        ]
        a, b = _overlap(self.own, self.wanted)
        parts[self.index] = x.narrow(dim, a - self.own[0] if b > a else 0, b - a)
        return torch.cat(parts, dim).contiguous()


def count(rows: Iterable[Rows]) -> int:
    """How many rows there are in all."""
    return sum(stop - start for start, stop in rows)


def row_of(shape: Sequence[int], dim: int) -> int:
    """Elements at one position of a dim."""
    return math.prod(size for at, size in enumerate(shape) if at != dim)


def _overlap(rows: Rows, wanted: Rows) -> Rows:
    start, end = max(rows[0], wanted[0]), min(rows[1], wanted[1])
    return (start, end) if start < end else (0, 0)
