"""Which positions of an axis each rank holds, once some runs of factors are split over mesh dimensions.

Axes given here must be interned (one object per structure), as axis inference leaves them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .axes import Axis, Concat, factors_of, parts_of

Unit = tuple[Axis, ...]
"""Consecutive factors of a product that are cut as one flat axis; most often a single atom."""


def share(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of part ``index`` of ``size`` positions in ``parts`` parts, even as they go, larger ones first."""
    base, extra = divmod(size, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


class Split:
    """Units split over one mesh dimension.

    Args:
        dim: name of the mesh dimension (or of several taken as one).
        parts: its number of ranks.
        units: what is split; every unit is cut into ``parts`` by itself.
        cuts: for some axes, whole ones or factors, where the part of each rank ends, in place of an even share: rows
            that an operator with a window makes lie where the rows lie that it reads.
        within: another split of the same units, every part of which is cut by itself: a rank holds its share of each.
    """

    def __init__(
        self,
        dim: str,
        parts: int,
        units: Iterable[Unit],
        cuts: Mapping[Axis, tuple[int, ...]] | None = None,
        within: Split | None = None,
    ):
        self.dim = dim
        self.parts = parts
        self.units = tuple(sorted(units, key=len, reverse=True))
        self.cuts = dict(cuts or {})
        self.within = within
        self._known: dict[int, tuple[Axis, tuple[int, int] | bool]] = {}
        self._places: dict[int, tuple[Axis, tuple[bytes, ...] | None]] = {}

    def splits(self, axis: Axis) -> bool:
        """Whether ranks can hold different positions of ``axis``: exactly one factor of a product, or every part of a
        concatenation, is split."""
        return self._run(axis) is not False

    def _run(self, axis: Axis) -> tuple[int, int] | bool:
        """The run of factors that is split; True for a concatenation of which every part is."""
        cached = self._known.get(id(axis))
        if cached is None:
            cached = self._known[id(axis)] = (axis, self._find(axis))
        return cached[1]

    def _find(self, axis: Axis) -> tuple[int, int] | bool:
        factors = factors_of(axis)
        runs = []
        start = 0
        while start < len(factors):
            length = self._match(factors, start)
            if length:
                runs.append((start, start + length))
            start += max(length, 1)
        if runs:
            return runs[0] if len(runs) == 1 else False
        return isinstance(axis, Concat) and bool(axis.parts) and all(self.splits(part) for part in axis.parts)

    def _match(self, factors: Sequence[Axis], start: int) -> int:
        for unit in self.units:
            if len(unit) <= len(factors) - start and all(a is b for a, b in zip(unit, factors[start:], strict=False)):
                return len(unit)
        factor = factors[start]
        return int(factor in self.cuts or len(factors) > 1 and isinstance(factor, Concat) and self.splits(factor))

    def length(self, axis: Axis, index: int) -> int:
        """How many positions of ``axis`` rank ``index`` holds."""
        run = self._run(axis)
        if run is False:
            return axis.size
        if run is True:
            return sum(self.length(part, index) for part in parts_of(axis))
        outer, middle, inner = self._around(axis, run)
        return math.prod(f.size for f in (*outer, *inner)) * self._held(middle, index)

    def _around(self, axis: Axis, run: tuple[int, int]) -> tuple[Sequence[Axis], Sequence[Axis], Sequence[Axis]]:
        factors = factors_of(axis)
        return factors[: run[0]], factors[run[0] : run[1]], factors[run[1] :]

    def _held(self, middle: Sequence[Axis], index: int) -> int:
        if self._joined(middle):
            return self.length(middle[0], index)
        return sum(stop - start for start, stop in self._shares(middle, index))

    def _joined(self, middle: Sequence[Axis]) -> bool:
        """Whether the factor that is split is a concatenation of parts that are split, each by itself."""
        return len(middle) == 1 and isinstance(middle[0], Concat) and not self.cuts_whole(middle[0])

    def cuts_whole(self, axis: Axis) -> bool:
        """Whether an axis is a concatenation that is split by its own positions, not by those of its parts."""
        return isinstance(axis, Concat) and (axis in self.cuts or (axis,) in self.units)

    def _shares(self, middle: Sequence[Axis], index: int) -> list[tuple[int, int]]:
        """The runs of neighbouring positions that a rank holds of what is cut as one, in order."""
        if self.within is None:
            return [self._share(middle, index)]
        runs = []
        for outer in range(self.within.parts):
            begin, end = self.within._share(middle, outer)
            start, stop = share(end - begin, self.parts, index)
            runs.append((begin + start, begin + stop))
        return runs

    def _share(self, middle: Sequence[Axis], index: int) -> tuple[int, int]:
        ends = self.cuts.get(middle[0]) if len(middle) == 1 else None
        if ends is not None:
            return (0, *ends)[index], ends[index]
        return share(math.prod(f.size for f in middle), self.parts, index)

    def positions(self, axis: Axis, index: int) -> np.ndarray:
        """Global positions of ``axis`` that rank ``index`` of this dimension holds, in local order."""
        run = self._run(axis)
        if run is False:
            return np.arange(axis.size)
        if run is True:
            parts = parts_of(axis)
            offsets = np.cumsum([0] + [part.size for part in parts])
            return np.concatenate([self.positions(part, index) + at for part, at in zip(parts, offsets, strict=False)])
        outer, middle, inner = self._around(axis, run)
        if self._joined(middle):
            kept = self.positions(middle[0], index)
        else:
            kept = np.concatenate([np.arange(*run) for run in self._shares(middle, index)])
        shape = [math.prod(f.size for f in group) for group in (outer, middle, inner)]
        return np.arange(axis.size).reshape(shape)[:, kept].reshape(-1)

    def ends(self, axis: Axis) -> tuple[int, ...] | None:
        """Where the part of each rank ends; None where ranks do not hold neighbouring positions, in rank order, or hold
        some of every part of another split."""
        if self.within is not None:
            return None
        held = [self.positions(axis, index) for index in range(self.parts)]
        if not np.array_equal(np.concatenate(held), np.arange(axis.size)):
            return None
        return tuple(int(end) for end in np.cumsum([len(positions) for positions in held]))

    def places(self, axis: Axis) -> tuple[bytes, ...] | None:
        """What tells apart how axes lie on the ranks: a digest of every rank's positions; None for one not split."""
        if id(axis) not in self._places:
            digests = None
            if self.splits(axis):
                held = (self.positions(axis, index).tobytes() for index in range(self.parts))
                digests = tuple(hashlib.sha256(positions).digest() for positions in held)
            self._places[id(axis)] = (axis, digests)
        return self._places[id(axis)][1]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """All splits together, seen from one rank.

    Args:
        splits: by the name of their mesh dimension.
        index: this rank's place along each.
    """

    splits: Mapping[str, Split]
    index: Mapping[str, int]

    def length(self, axis: Axis, dims: Sequence[str]) -> int:
        """Positions of ``axis`` on this rank when it is split over ``dims``."""
        active = [dim for dim in dims if self.splits[dim].splits(axis)]
        if not active:
            return axis.size
        if len(active) == 1:
            return self.splits[active[0]].length(axis, self.index[active[0]])
        return len(self.positions(axis, active))

    def sizes(self, axes: Sequence[Axis], split: Mapping[str, int]) -> list[int]:
        """The shape on this rank of a tensor of which each mesh dimension in ``split`` splits the dim given there."""
        return [self.length(axis, [name for name, own in split.items() if own == dim]) for dim, axis in enumerate(axes)]

    def positions(self, axis: Axis, dims: Sequence[str], index: Mapping[str, int] | None = None) -> np.ndarray:
        """Global positions of ``axis`` held when it is split over ``dims``, in local order."""
        index = {**self.index, **(index or {})}
        held = np.arange(axis.size)
        for dim in dims:
            held = held[np.isin(held, self.splits[dim].positions(axis, index[dim]))]
        return held
