"""The algebra of named axes: what a tensor's dimension means, and how two meanings are made one.

An axis is an atom (a size), a product of axes from outer to inner (a flattened grid), or a concatenation of axes. Atoms
are variables: unification binds an atom to another axis, or refines it into a product or a concatenation where an
operator cuts it. Every binding is on a trail, so that a refused unification leaves nothing behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class Conflict(Exception):
    """Two structures that refuse to be one axis; the message is the reason."""


class Axis:
    """Base of the three kinds; ``size`` is the number of positions."""

    __slots__ = ("size",)
    size: int


class Atom(Axis):
    """An axis whose inside is not (yet) known."""

    __slots__ = ("bound", "serial")

    def __init__(self, size: int, serial: int):
        self.size = size
        self.serial = serial
        self.bound: Axis | None = None

    def __repr__(self) -> str:
        return f"a{self.serial}:{self.size}" if self.bound is None else repr(self.bound)


class Product(Axis):
    """Axes flattened into one, outermost first."""

    __slots__ = ("factors",)

    def __init__(self, factors: Sequence[Axis]):
        self.factors = tuple(factors)
        self.size = math.prod(factor.size for factor in self.factors)

    def __repr__(self) -> str:
        return "(" + "·".join(map(repr, self.factors)) + ")"


class Concat(Axis):
    """Axes laid end to end."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[Axis]):
        self.parts = tuple(parts)
        self.size = sum(part.size for part in self.parts)

    def __repr__(self) -> str:
        return "[" + "|".join(map(repr, self.parts)) + "]"


class AxisSystem:
    """Makes atoms, unifies axes, and takes back what a refused unification had bound."""

    def __init__(self) -> None:
        self._trail: list[Atom] = []
        self._serial = 0

    def atom(self, size: int) -> Atom:
        self._serial += 1
        return Atom(size, self._serial)

    def mark(self) -> int:
        return len(self._trail)

    def rollback(self, mark: int) -> None:
        """Undo every binding made since ``mark``."""
        while len(self._trail) > mark:
            self._trail.pop().bound = None

    def _bind(self, atom: Atom, axis: Axis) -> None:
        if any(inner is atom for inner in atoms(axis)):
            raise Conflict(f"{atom!r} would contain itself in {axis!r}")
        atom.bound = axis
        self._trail.append(atom)

    def unify(self, left: Axis, right: Axis) -> None:
        """Make two axes one.

        Raises:
            Conflict: when their structures cannot both hold; nothing stays bound then.
        """
        mark = self.mark()
        try:
            self._unify(left, right)
        except Conflict:
            self.rollback(mark)
            raise

    def _unify(self, left: Axis, right: Axis) -> None:
        left, right = resolve(left), resolve(right)
        if left is right:
            return
        if left.size != right.size:
            raise Conflict(f"sizes {left.size} and {right.size} differ")
        if isinstance(left, Atom) and isinstance(right, Atom):
            older, newer = (left, right) if left.serial < right.serial else (right, left)
            self._bind(newer, older)
        elif isinstance(left, Atom):
            self._bind(left, right)
        elif isinstance(right, Atom):
            self._bind(right, left)
        elif isinstance(left, Product) and isinstance(right, Product):
            self._unify_products(left, right)
        else:
            self._unify_concats(left, right)

    def _unify_products(self, left: Product, right: Product) -> None:
        lefts, rights = list(left.factors), list(right.factors)
        while lefts and rights:
            a, b = lefts.pop(), rights.pop()
            if a.size > b.size:
                outer, a = self.split(a, b.size)
                lefts.extend(factors_of(outer))
            elif b.size > a.size:
                outer, b = self.split(b, a.size)
                rights.extend(factors_of(outer))
            self._unify(a, b)

    def _unify_concats(self, left: Axis, right: Axis) -> None:
        lefts, rights = list(reversed(parts_of(left))), list(reversed(parts_of(right)))
        while lefts and rights:
            a, b = lefts.pop(), rights.pop()
            if a.size > b.size:
                a, rest = self.cut(a, b.size)
                lefts.append(rest)
            elif b.size > a.size:
                b, rest = self.cut(b, a.size)
                rights.append(rest)
            self._unify(a, b)

    def split(self, axis: Axis, inner: int) -> tuple[Axis, Axis]:
        """Split an axis into an outer factor and an inner one of size ``inner``.

        Raises:
            Conflict: when no boundary can fall there.
        """
        axis = resolve(axis)
        if axis.size % inner:
            raise Conflict(f"{axis.size} positions do not divide into groups of {inner}")
        if inner == axis.size:
            return self.atom(1), axis
        if inner == 1:
            return axis, self.atom(1)
        if isinstance(axis, Atom):
            outer_atom, inner_atom = self.atom(axis.size // inner), self.atom(inner)
            self._bind(axis, Product((outer_atom, inner_atom)))
            return outer_atom, inner_atom
        if isinstance(axis, Product):
            return self._split_product(axis, inner)
        assert isinstance(axis, Concat)
        if any(part.size % inner for part in axis.parts):
            return self._split_chunks(axis, inner)
        pairs = [self.split(part, inner) for part in axis.parts]
        for _, other in pairs[1:]:
            self._unify(pairs[0][1], other)
        return Concat([outer for outer, _ in pairs]), pairs[0][1]

    def _split_chunks(self, axis: Axis, inner: int) -> tuple[Axis, Axis]:
        """A concatenation of parts smaller than ``inner``: every run of ``inner`` positions is the same axis."""
        chunk, rest = self.cut(axis, inner)
        count = axis.size // inner
        for left in range(count - 1, 0, -1):
            if left > 1:
                other, rest = self.cut(rest, inner)
            else:
                other = rest
            self._unify(chunk, other)
        return self.atom(count), chunk

    def _split_product(self, axis: Product, inner: int) -> tuple[Axis, Axis]:
        factors, taken, want = list(axis.factors), [], inner
        while want > 1:
            factor = factors.pop()
            if want % factor.size == 0:
                want //= factor.size
                taken.append(factor)
            else:
                outer, low = self.split(factor, want)
                want = 1
                taken.append(low)
                factors.append(outer)
        return product(factors) if factors else self.atom(1), product(taken[::-1])

    def cut(self, axis: Axis, boundary: int) -> tuple[Axis, Axis]:
        """Cut an axis into the positions before ``boundary`` and those from it on (``0 < boundary < size``).

        Raises:
            Conflict: when the cut falls inside an inner factor.
        """
        axis = resolve(axis)
        if isinstance(axis, Atom):
            low, high = self.atom(boundary), self.atom(axis.size - boundary)
            self._bind(axis, Concat((low, high)))
            return low, high
        if isinstance(axis, Product):
            inner = axis.size // axis.factors[0].size
            if boundary % inner:
                raise Conflict(f"a cut at {boundary} falls inside a factor of {inner} of {axis!r}")
            head, tail = self.cut(axis.factors[0], boundary // inner)
            return product((head, *axis.factors[1:])), product((tail, *axis.factors[1:]))
        assert isinstance(axis, Concat)
        before: list[Axis] = []
        after: list[Axis] = []
        offset = 0
        for sub_axis in axis.parts:
            if offset + sub_axis.size <= boundary:
                before.append(sub_axis)
            elif offset >= boundary:
                after.append(sub_axis)
            else:
                head, tail = self.cut(sub_axis, boundary - offset)
                before.append(head)
                after.append(tail)
            offset += sub_axis.size
        return concat(before), concat(after)

    def segment(self, axis: Axis, start: int, stop: int) -> Axis:
        """The axis of positions ``start`` to ``stop``, cutting where needed.

        Raises:
            Conflict: as `cut` does; nothing stays bound then.
        """
        mark = self.mark()
        try:
            if stop < axis.size:
                axis = self.cut(axis, stop)[0]
            return self.cut(axis, start)[1] if start > 0 else axis
        except Conflict:
            self.rollback(mark)
            raise

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """Lay the factors of ``axes`` out anew over dims of ``sizes`` (the same number of positions in all).

        Raises:
            Conflict: when a boundary falls inside a factor that cannot be split there; nothing stays bound then.
        """
        mark = self.mark()
        try:
            factors = [factor for axis in axes for factor in factors_of(resolve(axis))]
            grouped: list[Axis] = []
            for size in reversed(sizes):
                taken: list[Axis] = []
                want = size
                while want > 1:
                    factor = factors.pop()
                    if want % factor.size == 0:
                        want //= factor.size
                        taken.append(factor)
                    else:
                        outer, low = self.split(factor, want)
                        want = 1
                        taken.append(low)
                        factors.extend(factors_of(resolve(outer)))
                grouped.append(product(taken[::-1]) if taken else self.atom(1))
            return grouped[::-1]
        except Conflict:
            self.rollback(mark)
            raise


def product(factors: Sequence[Axis]) -> Axis:
    """A product, or its only factor."""
    return factors[0] if len(factors) == 1 else Product(factors)


def concat(parts: Sequence[Axis]) -> Axis:
    """A concatenation, or its only part."""
    return parts[0] if len(parts) == 1 else Concat(parts)


def resolve(axis: Axis) -> Axis:
    """The canonical form: bindings followed, products and concatenations flat, factors of 1 and parts of 0 dropped.

    A concatenation that is the outermost factor of a product is distributed: ``([a|b]·c)`` is ``[(a·c)|(b·c)]``.
    """
    if isinstance(axis, Atom):
        while isinstance(axis, Atom) and axis.bound is not None:
            axis = axis.bound
        return axis if isinstance(axis, Atom) else resolve(axis)
    if isinstance(axis, Product):
        factors = [inner for factor in axis.factors for inner in factors_of(resolve(factor)) if inner.size != 1]
        if not factors:
            return resolve(axis.factors[0])
        if len(factors) == 1:
            return factors[0]
        if isinstance(factors[0], Concat):
            return resolve(Concat([Product((sub_axis, *factors[1:])) for sub_axis in factors[0].parts]))
        return Product(factors)
    assert isinstance(axis, Concat)
    parts = [inner for sub_axis in axis.parts for inner in parts_of(resolve(sub_axis)) if inner.size != 0]
    return parts[0] if len(parts) == 1 else Concat(parts)


def atoms(axis: Axis) -> list[Atom]:
    """The atoms inside an axis, from outer to inner and left to right, with repetitions."""
    axis = resolve(axis)
    if isinstance(axis, Atom):
        return [axis]
    assert isinstance(axis, Product | Concat)
    children = axis.factors if isinstance(axis, Product) else axis.parts
    return [atom for child in children for atom in atoms(child)]


def same(left: Axis, right: Axis) -> bool:
    """Whether two axes are one and the same structure of the same atoms."""
    left, right = resolve(left), resolve(right)
    if left is right:
        return True
    if isinstance(left, Product) and isinstance(right, Product):
        pairs = left.factors, right.factors
    elif isinstance(left, Concat) and isinstance(right, Concat):
        pairs = left.parts, right.parts
    else:
        return False
    return len(pairs[0]) == len(pairs[1]) and all(same(a, b) for a, b in zip(*pairs, strict=True))


def factors_of(axis: Axis) -> tuple[Axis, ...]:
    """The factors of a product, outermost first; any other axis alone."""
    return axis.factors if isinstance(axis, Product) else (axis,)


def parts_of(axis: Axis) -> tuple[Axis, ...]:
    """The parts of a concatenation, in order; any other axis alone."""
    return axis.parts if isinstance(axis, Concat) else (axis,)


def outermost(axis: Axis) -> Axis:
    """The outermost factor of a product; any other axis itself.

    Query heads are key heads times a group: what is cut by it keeps whole groups together.
    """
    return factors_of(axis)[0]
