"""What a call leaves in the lists and dicts that it was given, and how to leave the same in those of another call."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .results import PLAIN

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


class Outcome(NamedTuple):
    """All that a call did: what it returned, and what it left in containers whose contents it changed."""

    result: Any
    left: tuple[Left, ...] = ()


def containers_of(inputs: Any) -> list[Any]:
    """The lists, dicts and deques among inputs, outermost first; one that stands in two places is there twice."""
    return list(_containers(inputs))


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, MUTABLE):
        yield value
    children = pytree.tree_leaves(value, is_leaf=lambda part: part is not value)
    for child in children if children != [value] else ():
        yield from _containers(child)


def observed(call: Callable[..., Any], args: tuple, kwargs: dict) -> Outcome:
    """Call a function and note what it does to the containers that it is given.

    Raises:
        CaptureError: it changes one of a class whose contents cannot be replaced.
    """
    leaves, given = pytree.tree_leaves((args, kwargs)), containers_of((args, kwargs))
    before = [_items(container) for container in given]
    result = call(*args, **kwargs)
    known = {id(leaf): Given(at) for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    known |= {id(container): Same(number) for number, container in enumerate(given)}  # type: ignore[misc]
    left = []
    for number, (container, items) in enumerate(zip(given, before, strict=True)):
        if _differ(items, _items(container)):
            if type(container) not in KNOWN:
                raise CaptureError(f"the module changes what a {type(container).__name__} that it is given holds")
            left.append(Left(number, _each(container, lambda part: known.get(id(part), part))))
    return Outcome(result, tuple(left))


def leave(left: tuple[Left, ...], inputs: Any) -> None:
    """Do to the containers of a call's inputs what another call did to its own.

    Raises:
        CaptureError: one container that changes was given in two places.
    """
    if not left:
        return
    leaves, given = pytree.tree_leaves(inputs), containers_of(inputs)
    changed = [given[each.number] for each in left]
    if any(sum(one is other for other in given) > 1 for one in changed):
        raise CaptureError("the module changes a list or dict that it is given twice: give it a copy in one place")
    for container, each in zip(changed, left, strict=True):
        content = _each(each.content, lambda part: _found(part, leaves, given))
        container.clear()
        container.update(content) if isinstance(container, dict) else container.extend(content)


def _found(part: Any, leaves: list[Any], given: list[Any]) -> Any:
    if isinstance(part, Given):
        return leaves[part.position]
    return given[part.number] if isinstance(part, Same) else part


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
