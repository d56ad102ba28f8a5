"""A second call of a model, of other sizes, and whether its axes are those of the first.

Equal sizes are no proof of equal axes. The sizes that a call lets one choose are found by its axes: atoms of inputs on
which no weight has a dim. Each gets a size that nothing in the call had; the model is captured again, and every dim of
every value must have the same axis as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.ir.axes import Atom, Axis, Concat, Product, atoms
from xdit_compile.passes.axes.infer import Frame, Inference
from xdit_compile.runtime.verify.smaller import free_atoms, placeholders

STEPS = (4, 2, 6, 8, 10, 12, 16, 1, 3, 5, -2, -4, -1, -3)
Sizes = Mapping[int, int]
Named = tuple[str, list[list[Axis]]]
"""What computes a value, and the axes of its tensors."""


@dataclasses.dataclass(frozen=True)
class Resized:
    """The same call with other sizes.

    ``changed`` has the old and the new size of each axis, ``kept`` the sizes for which the model takes no other.
    """

    args: tuple
    kwargs: dict
    changed: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]


def resized(module: nn.Module, args: tuple, kwargs: dict, inference: Inference, but: Collection[int] = ()) -> Resized:
    """A call in which as many axes of inputs as the model allows have a size that no axis of the first call had.

    Axes of the sizes in ``but`` keep them: numbers that the model's own code has.
    """
    used = {axis.size for axis in every_atom(inference)}
    sizes: dict[int, int] = {}
    changed, kept = [], []
    for atom in (atom for atom in free_atoms(inference) if atom.size > 1 and atom.size not in but):
        options = [size for step in STEPS if (size := atom.size + step) > 1 and size not in used]
        tries = ((size, _inputs(args, kwargs, inference, {**sizes, id(atom): size})) for size in options)
        fitting = next((size for size, inputs in tries if _runs(module, inputs)), None)
        if fitting is None:
            kept.append(atom.size)
            continue
        sizes[id(atom)] = fitting
        used.add(fitting)
        changed.append((atom.size, fitting))
    return Resized(*_inputs(args, kwargs, inference, sizes), tuple(changed), tuple(kept))


def every_atom(inference: Inference) -> Iterator[Atom]:
    tables = [inference.axes, *(frame.axes for frame in inference.frames)]
    for table in tables:
        for groups in table.values():
            for axes in groups:
                for axis in axes:
                    yield from atoms(axis)


def _runs(module: nn.Module, inputs: tuple[tuple, dict]) -> bool:
    try:
        with torch.no_grad():
            module(*inputs[0], **inputs[1])
    except Exception:
        return False
    return True


def _inputs(args: tuple, kwargs: dict, inference: Inference, sizes: Sizes) -> tuple[tuple, dict]:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for given, node in placeholders(inference):
        if given.kind == "user":
            at = int(given.target)
            for dim, axis in enumerate(inference.axes[node][0]):
                size = _size(axis, sizes)
                if size != leaves[at].shape[dim]:
                    leaves[at] = leaves[at].index_select(dim, torch.arange(size) % leaves[at].shape[dim])
    return pytree.tree_unflatten(leaves, spec)


def _size(axis: Axis, sizes: Sizes) -> int:
    if isinstance(axis, Product):
        return torch.Size([_size(factor, sizes) for factor in axis.factors]).numel()
    if isinstance(axis, Concat):
        return sum(_size(part, sizes) for part in axis.parts)
    return sizes.get(id(axis), axis.size)


class OtherGraph(Exception):
    """The two captures do not have the same operators: the model's code computes something else at the other size."""


def differences(first: Inference, second: Inference) -> list[str]:
    """Where two captures of one model differ in what their dims mean.

    Raises:
        OtherGraph: where they are not the same operators in the same order.
    """
    pairs, found = _Pairs(), []
    for place, one, other in _dims(first, second):
        if not pairs.match(one, other):
            found.append(f"{place}: {one} is {other} at the other size")
    return found


class _Pairs:
    """Which atom of the second capture each of the first is."""

    def __init__(self) -> None:
        self._there: dict[int, Atom] = {}
        self._back: dict[int, Atom] = {}

    def match(self, one: Axis, other: Axis) -> bool:
        if isinstance(one, Atom) and isinstance(other, Atom):
            there, back = self._there.setdefault(id(one), other), self._back.setdefault(id(other), one)
            return one.size == other.size == 1 or there is other and back is one
        if type(one) is not type(other):
            return False
        left, right = (getattr(axis, "factors", None) or getattr(axis, "parts", ()) for axis in (one, other))
        return len(left) == len(right) and all(self.match(a, b) for a, b in zip(left, right, strict=True))


def _dims(first: Inference, second: Inference) -> Iterator[tuple[str, Axis, Axis]]:
    sides = [[(str(given.target), each.axes[node]) for given, node in placeholders(each)] for each in (first, second)]
    yield from _beside("inputs", *sides)
    if len(first.frames) != len(second.frames):
        raise OtherGraph(f"{len(first.frames)} and {len(second.frames)} calls")
    for one, other in zip(first.frames, second.frames, strict=True):
        yield from _beside(one.call.meta.get("path", "") or str(one.call), _values(one), _values(other))


def _values(frame: Frame) -> list[Named]:
    return [
        (str(node.target) if node.op == "call_function" else node.op, frame.axes[node])
        for node in frame.graph.nodes
        if node in frame.axes
    ]


def _beside(place: str, one: list[Named], other: list[Named]) -> Iterator[tuple[str, Axis, Axis]]:
    if [name for name, _ in one] != [name for name, _ in other]:
        raise OtherGraph(f"{place}: {len(one)} and {len(other)} values, or others")
    for at, ((name, groups), (_, others)) in enumerate(zip(one, other, strict=True)):
        if [len(axes) for axes in groups] != [len(axes) for axes in others]:
            raise OtherGraph(f"{place}: {name} has {len(groups)} and {len(others)} results, or of other dims")
        for axes, axes_there in zip(groups, others, strict=True):
            for dim, pair in enumerate(zip(axes, axes_there, strict=True)):
                yield f"{place}: value {at} ({name}) dim {dim}", *pair
