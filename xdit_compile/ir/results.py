"""What modules and pipelines return: finds the tensors in it, and puts others in their places.

A class of results may demand arguments, leave out fields that are None, or derive numbers from its tensors. So none is
ever made by its class: fields are replaced in the object that was made, or in a copy of it made without ``__init__``.

Lists, tuples, dicts, deques and what derives from them are looked into, and so are objects with attributes, such as
distributions. An attribute that is the item of the same name, as in the outputs of diffusers, is one place with it.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.errors import CaptureError

Kind = type | tuple[type, ...]
Change = Callable[[Any], Any]

CONTAINERS: tuple[Any, ...] = (collections.OrderedDict, collections.defaultdict, dict, list, tuple, collections.deque)
"""Classes whose items are looked into, a derived one before its base."""
CLOSED = (torch.Tensor, nn.Module, type, enum.Enum, types.ModuleType, types.FunctionType, types.MethodType)
"""Classes whose attributes are not looked into."""
PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
ABSENT = object()


def found_in(result: Any, kind: Kind) -> list[Any]:
    """The leaves of a kind in a result, in a fixed order; one that stands in two places is there twice."""
    leaves: list[Any] = []

    def see(leaf: Any) -> Any:
        leaves.append(leaf)
        return leaf

    replaced(result, kind, see)
    return leaves


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors in a result, as `found_in` finds them."""
    return found_in(result, torch.Tensor)


def replaced(result: Any, kind: Kind, change: Change) -> Any:
    """The very object, with ``change(leaf)`` for every leaf of a kind; only tuples that hold one are made anew."""
    return _Walk(kind, change, copies=False).of(result)


def copied(result: Any, kind: Kind, change: Change) -> Any:
    """A copy of a result's containers and of the objects that hold leaves of a kind, with ``change(leaf)`` for each."""
    return _Walk(kind, change, copies=True).of(result)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Stands in the place of a result's tensor."""

    number: int


@dataclasses.dataclass(frozen=True)
class Template:
    """A result without its tensors: ``form`` has a `Slot` for each of ``count`` places.

    ``paths`` says how each is reached: item or attribute, and which, again and again.
    """

    form: Any
    count: int
    paths: tuple[tuple[tuple[bool, Any], ...], ...]

    @classmethod
    def of(cls, result: Any) -> Template:
        """The template of a result, none of whose tensors it keeps.

        Raises:
            CaptureError: a set holds tensors, which have no order then.
        """
        for _, found in _leaves(result, (set, frozenset), set()):
            if any(isinstance(entry, torch.Tensor) for entry in found):
                raise CaptureError("the module returns tensors in a set, which has no order; return a list")
        numbers = itertools.count()
        form = copied(result, torch.Tensor, lambda _: Slot(next(numbers)))
        paths = tuple(path for path, _ in sorted(_leaves(form, Slot, set()), key=lambda found: found[1].number))
        return cls(form, next(numbers), paths)

    def inner(self, key: Any) -> Template:
        """The template of an item of a result."""
        paths = tuple(path[1:] for path in self.paths if path[0] == (True, key))
        return Template(self.form[key], len(paths), paths)

    def filled(self, tensors: Sequence[torch.Tensor]) -> Any:
        """A result of its own that holds these tensors, in the order of `tensors_of`."""
        return copied(self.form, Slot, lambda slot: tensors[slot.number])

    def taken(self, result: Any) -> list[torch.Tensor]:
        """`tensors_of` a result that is made alike, by nothing but look-ups, which compilers of Python understand."""
        tensors = []
        for path in self.paths:
            reached = result
            for is_item, key in path:
                reached = reached[key] if is_item else getattr(reached, key)
            tensors.append(reached)
        return tensors


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a part of an object stands: an item of a container, an attribute, or both."""

    container: Any = None
    key: Any = None
    attribute: str | None = None

    def put(self, target: Any, child: Any) -> None:
        """Have an object hold a child here, past what its class does about that."""
        if self.container is not None:
            self.container.__setitem__(target, self.key, child)
        if self.attribute is not None:
            _set_attribute(target, self.attribute, child)


def members_of(value: Any) -> list[tuple[Spot, Any]]:
    """What a container or object holds directly, and where: items first, then attributes that are none of them."""
    attributes = _attributes(value)
    entries = []
    container = container_of(type(value))
    if container is not None:
        for key, child in container.items(value) if isinstance(value, dict) else enumerate(container.__iter__(value)):
            both = key if isinstance(key, str) and attributes.get(key, ABSENT) is child else None
            entries.append((Spot(container, key, both), child))
            if both is not None:
                del attributes[both]
    return entries + [(Spot(attribute=name), child) for name, child in attributes.items()]


def is_open(value: Any) -> bool:
    """Whether a value is looked into."""
    if isinstance(value, PLAIN):
        return False
    return isinstance(value, CONTAINERS) or not isinstance(value, CLOSED) and _has_attributes(value)


class _Walk:
    """Goes through a result and changes leaves of a kind, in the objects or in copies of them."""

    def __init__(self, kind: Kind, change: Change, copies: bool):
        self._kind, self._change, self._copies = kind, change, copies
        self._known: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        if isinstance(value, self._kind):
            return self._change(value)
        if not is_open(value):
            return value
        if id(value) not in self._known:
            if isinstance(value, tuple):
                self._known[id(value)] = (value, self._tuple(value))
            else:
                self._known[id(value)] = (value, self._target(value))
                self._fill(*self._known[id(value)])
        return self._known[id(value)][1]

    def _target(self, value: Any) -> Any:
        """What the parts of a value are put into."""
        kept = not self._copies or not isinstance(value, CONTAINERS) and not self._holds(value)
        return value if kept else _shallow(value)

    def _holds(self, value: Any) -> bool:
        return next(_leaves(value, self._kind, set()), ABSENT) is not ABSENT

    def _fill(self, value: Any, target: Any) -> None:
        for place, child in members_of(value):
            new = self.of(child)
            if new is not child:
                place.put(target, new)

    def _tuple(self, value: tuple) -> tuple:
        parts = [(place, child, self.of(child)) for place, child in members_of(value)]
        if all(new is child for _, child, new in parts):
            return value
        items = [new for place, _, new in parts if place.container is not None]
        if pytree.is_structseq_instance(value):
            return type(value)(items)
        made = tuple.__new__(type(value), items)
        for place, _, new in parts:
            if place.attribute is not None:
                _set_attribute(made, place.attribute, new)
        return made


def _leaves(value: Any, kind: Kind, seen: set[int], path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Leaves of a kind in a value, each with its path."""
    if isinstance(value, kind):
        yield path, value
    elif is_open(value) and id(value) not in seen:
        seen.add(id(value))
        for place, child in members_of(value):
            is_item = place.container is not None
            yield from _leaves(child, kind, seen, (*path, (is_item, place.key if is_item else place.attribute)))


def container_of(cls: type) -> Any:
    """The class of Python's own whose items a class has; None for one that has attributes alone."""
    return next((container for container in CONTAINERS if issubclass(cls, container)), None)


def _shallow(value: Any) -> Any:
    """A copy that holds the same parts, of which no method of the class knows."""
    container = container_of(type(value))
    made = (container or object).__new__(type(value))
    if container is collections.defaultdict:
        container.__init__(made, value.default_factory)
    elif container is collections.deque:
        container.__init__(made, (), value.maxlen)
    for name, child in _attributes(value).items():
        _set_attribute(made, name, child)
    if isinstance(value, dict):
        for key, child in container.items(value):
            container.__setitem__(made, key, child)
    elif container is not None:
        container.extend(made, container.__iter__(value))
    return made


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") or any(True for _ in _slots(type(value)))


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes that an object holds itself, whether in its dict or in slots."""
    slots = {name: object.__getattribute__(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    return {**getattr(value, "__dict__", {}), **slots}


def _slots(cls: type) -> Iterator[str]:
    for base in cls.__mro__:
        if "__slots__" in vars(base):
            yield from (name for name, one in vars(base).items() if isinstance(one, types.MemberDescriptorType))


def _set_attribute(target: Any, name: str, value: Any) -> None:
    if name in _slots(type(target)):
        object.__setattr__(target, name, value)
    else:
        vars(target)[name] = value
