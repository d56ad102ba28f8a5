"""What hangs on modules besides weights and children, described so that every change of it is seen."""

from __future__ import annotations

import collections
import copyreg
import enum
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from xdit_compile.ir.digest import digest_tensors
from xdit_compile.ir.versions import version_of

VALUES = frozenset({bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type, type(None)})
OPAQUE = (nn.Module, type, types.ModuleType, types.BuiltinFunctionType, torch.Generator)

POINTER = object.__basicsize__ // 2
"""Bytes of what an instance may hold apart from its slots: a dict of attributes and a list of weak references."""

Seen = dict[int, tuple[int, Any]]
"""Objects described already, by identity, with their numbers; their second mention is no more than that."""


def described(value: Any, seen: Seen) -> Any:
    """A description that equals a later one as long as nothing reachable from ``value`` changed.

    Two objects are alike if their classes are and all that they hold is, as attention processors that a pipeline makes
    anew for every request. Reached are containers, objects of classes written in Python with all that hangs on them,
    what functions enclose, and tensors, by their values. A module that is met on the way counts as itself alone.
    """
    kind = value.__class__
    if kind in VALUES:
        return value
    if isinstance(value, torch.Tensor):
        return HeldTensor(value)
    if isinstance(value, enum.Enum):
        return (kind, value.name)
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, OPAQUE):
        return Same(value)
    if id(value) in seen:
        return ("again", seen[id(value)][0])
    seen[id(value)] = (len(seen), value)
    return _parts(value, seen)


def _parts(value: Any, seen: Seen) -> Any:
    if isinstance(value, dict | types.MappingProxyType):
        return Entries((_name(key), described(item, seen)) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return frozenset(_name(item) for item in value)
    if isinstance(value, list | tuple | collections.deque):
        return Entries((index, described(item, seen)) for index, item in enumerate(value))
    if isinstance(value, functools.partial):
        return Entries(
            (("func", described(value.func, seen)), ("args", described(value.args, seen)),
             ("keywords", described(value.keywords, seen)))
        )  # fmt: skip
    if isinstance(value, types.MethodType):
        return (described(value.__func__, seen), described(value.__self__, seen))
    return (_kind(value), Entries((name, described(item, seen)) for name, item in held_in(value)))


def _kind(value: Any) -> Any:
    """What two objects have in common that do the same as long as all that they hold is the same."""
    if isinstance(value, types.FunctionType):
        return Same(value.__code__)
    kind = value.__class__
    inside = kind.__basicsize__ - object.__basicsize__ - POINTER * len(slots_of(value))
    return kind if inside <= 2 * POINTER and kind.__dictoffset__ + len(slots_of(value)) else Same(value)


def held_in(value: Any) -> Iterator[tuple[str, Any]]:
    """What a function encloses, or an object has as attributes and in slots, by name."""
    if isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:
                continue
        yield from (("defaults", value.__defaults__), ("keyword defaults", value.__kwdefaults__))
    yield from getattr(value, "__dict__", {}).items()
    for name in slots_of(value):
        if hasattr(value, name):
            yield name, getattr(value, name)


def slots_of(value: Any) -> list[str]:
    """The names of an object's slots."""
    names = copyreg._slotnames(value.__class__)  # type: ignore[attr-defined]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _name(key: Any) -> Any:
    return key if key.__class__ in VALUES or isinstance(key, enum.Enum) else Same(key)


class Entries(tuple[tuple[Any, Any], ...]):
    """Descriptions by name."""

    __slots__ = ()


class Same:
    """An object that equals only itself, without keeping it alive where it can be referred to weakly."""

    __slots__ = ("key", "reference")

    def __init__(self, value: Any) -> None:
        self.key = id(value)
        try:
            self.reference: Any = weakref.ref(value)
        except TypeError:
            self.reference = lambda: value

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Same) and self.key == other.key and (value := self.reference()) is not None
            and value is other.reference()
        )  # fmt: skip

    def __hash__(self) -> int:
        return self.key

    def __repr__(self) -> str:
        return f"a {type(self.reference()).__name__}"


class HeldTensor:
    """The values of a tensor as they are now; read only where another tensor, or a written one, may hold the same.

    `keep` reads them, so that the description outlives what is done to the tensor.
    """

    __slots__ = ("_digest", "_key", "_reference", "_version", "kind")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.kind = (tensor.__class__, tensor.shape, tensor.dtype, tensor.device)
        self._key, self._version = id(tensor), version_of(tensor)
        self._reference = weakref.ref(tensor)
        self._digest: str | None = None

    def keep(self) -> None:
        """Read the values, if they are still those that were met."""
        if self._digest is None and (tensor := self._unchanged()) is not None:
            self._digest = digest_tensors([tensor])

    def _unchanged(self) -> torch.Tensor | None:
        tensor = self._reference()
        return tensor if tensor is not None and version_of(tensor) == self._version else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeldTensor) or self.kind != other.kind:
            return False
        if self._version is not None and (self._key, self._version) == (other._key, other._version):
            if self._unchanged() is not None:
                return True
        self.keep()
        other.keep()
        return self._digest is not None and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self.kind)

    def __repr__(self) -> str:
        return f"a {self.kind[0].__name__} {tuple(self.kind[1])} of other values"


def keep(description: Any) -> None:
    """Read the values of all tensors in a description, so that it can be compared whatever becomes of them."""
    if isinstance(description, HeldTensor):
        description.keep()
    elif isinstance(description, tuple):
        for part in description:
            keep(part)


def place_of_change(before: Any, after: Any) -> str:
    """The path inside of two descriptions at which they first differ, as ``.state.step``; empty where they do here."""
    if isinstance(before, Entries) and isinstance(after, Entries):
        old, new = dict(before), dict(after)
        for name in {**old, **new}:
            if name not in old or name not in new or old[name] != new[name]:
                return _joined(name) + place_of_change(old.get(name), new.get(name))
    elif isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after):
        for one, other in zip(before, after, strict=True):
            if one != other:
                return place_of_change(one, other)
    return ""


def _joined(name: Any) -> str:
    return f".{name}" if isinstance(name, str) else f"[{name!r}]"
