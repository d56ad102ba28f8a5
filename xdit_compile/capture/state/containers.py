"""What a call leaves in the lists, dicts and tensors that it is given, and how to leave it there after another call."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from xdit_compile.errors import CaptureError
from xdit_compile.ir.results import PLAIN
from xdit_compile.ir.versions import version_of

MUTABLE = (list, dict, collections.deque)
KNOWN = (list, dict, collections.OrderedDict, collections.defaultdict, collections.deque)
"""Classes of containers whose contents can be replaced as a whole; a class derived from one may do more than that."""


@dataclasses.dataclass(frozen=True)
class Given:
    """Stands for the flat input at this position."""

    position: int


@dataclasses.dataclass(frozen=True)
class Same:
    """Stands for the container that was given as this one, counted by `containers_of`."""

    number: int


class Left(NamedTuple):
    """What the container ``number`` holds after a call, in a list or dict; `Given` and `Same` stand for inputs."""

    number: int
    content: Any


class Written(NamedTuple):
    """The values of the flat input at ``position``, a tensor, after a call that wrote to it."""

    position: int
    values: Any


class Outcome(NamedTuple):
    """All that a call did: what it returned, what it left in containers whose contents it changed, and in tensors."""

    result: Any
    left: tuple[Left, ...] = ()
    written: tuple[Written, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether the call changed anything that it was given."""
        return bool(self.left or self.written)


RESULT = 0
"""Where an outcome has what a call returned."""


def containers_of(inputs: Any) -> list[Any]:
    """The lists, dicts and deques among inputs, outermost first; one that stands in two places is there twice."""
    return list(_containers(inputs))


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, MUTABLE):
        yield value
    children = pytree.tree_leaves(value, is_leaf=lambda part: part is not value)
    for child in children if children != [value] else ():
        yield from _containers(child)


def observed(
    call: Callable[..., Any], args: tuple, kwargs: dict, written: Collection[int] | None = None
) -> Outcome:  # fmt: skip
    """Call a function and note what it does to what it is given.

    Args:
        written: positions of the flat inputs that it writes to, where that is known; else tensors say it themselves,
            but those made in inference mode.

    Raises:
        CaptureError: it changes a container of a class whose contents cannot be replaced.
    """
    leaves, containers = pytree.tree_leaves((args, kwargs)), containers_of((args, kwargs))
    before, versions = [_items(container) for container in containers], [_version(leaf) for leaf in leaves]
    result = call(*args, **kwargs)
    if written is None:
        written = [position for position, leaf in enumerate(leaves) if _version(leaf) != versions[position]]
    known: dict[int, Given | Same] = {
        id(leaf): Given(position) for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)
    }
    known |= {id(container): Same(number) for number, container in enumerate(containers)}
    left = []
    for number, (container, items) in enumerate(zip(containers, before, strict=True)):
        if _differ(items, _items(container)):
            if type(container) not in KNOWN:
                raise CaptureError(f"the module changes what a {type(container).__name__} that it is given holds")
            left.append(Left(number, _each(container, lambda entry: known.get(id(entry), entry))))
    return Outcome(result, tuple(left), tuple(Written(position, leaves[position]) for position in written))


def _version(leaf: Any) -> int | None:
    return version_of(leaf) if isinstance(leaf, torch.Tensor) else None


def leave(outcome: Outcome, inputs: Any) -> None:
    """Do to a call's inputs what another call did to its own.

    Raises:
        CaptureError: what changes was given in two places.
    """
    if not outcome.changes:
        return
    leaves, containers = pytree.tree_leaves(inputs), containers_of(inputs)
    changed = [containers[each.number] for each in outcome.left]
    if any(sum(one is other for other in containers) > 1 for one in changed):
        raise CaptureError("the module changes a list or dict that it is given twice: give it a copy in one place")
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(sum(_overlap(leaves[each.position], other) for other in tensors) > 1 for each in outcome.written):
        raise CaptureError("the module writes to a tensor that shares memory with another input: give it a copy")
    for written in outcome.written:
        target = leaves[written.position]
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            target.copy_(written.values)
    for container, each in zip(changed, outcome.left, strict=True):
        content = _each(each.content, lambda entry: _found(entry, leaves, containers))
        container.clear()
        container.update(content) if isinstance(container, dict) else container.extend(content)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors may have bytes in common."""
    if one is other:
        return True
    if one.is_meta or one.device != other.device or not one.numel() or not other.numel():
        return False
    starts = (one.data_ptr(), other.data_ptr())
    return starts[0] < starts[1] + _extent(other) and starts[1] < starts[0] + _extent(one)


def _extent(tensor: torch.Tensor) -> int:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _found(entry: Any, leaves: list[Any], containers: list[Any]) -> Any:
    if isinstance(entry, Given):
        return leaves[entry.position]
    return containers[entry.number] if isinstance(entry, Same) else entry


def _items(container: Any) -> list[Any]:
    """What a container holds, keys of dicts included, in its order."""
    return [part for pair in container.items() for part in pair] if isinstance(container, dict) else list(container)


def _each(container: Any, change: Callable[[Any], Any]) -> Any:
    """A plain list or dict of what a container holds, changed one by one."""
    if isinstance(container, dict):
        return {key: change(part) for key, part in container.items()}
    return [change(part) for part in container]


def _differ(before: list[Any], after: list[Any]) -> bool:
    if len(before) != len(after):
        return True
    return not all(map(_equal, before, after))


def _equal(one: Any, other: Any) -> bool:
    return one is other or type(one) is type(other) and isinstance(one, PLAIN) and one == other
