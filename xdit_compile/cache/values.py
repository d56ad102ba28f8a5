"""Python values as plain data, which JSON can hold, and back; nothing is pickled.

None, truth values, finite numbers, strings and lists stand for themselves. Everything else is an object of one tag,
which says its type: ``{"tuple": [1, 2]}``. Types are compared exactly: what derives from one may be more than that.
"""

from __future__ import annotations

import base64
import enum
import hashlib
import importlib
import json
import math
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .unportable import Unportable

Describe = Callable[[Any], Any]
"""Says what a value of some further type is, mostly as an object of one tag; None for what it does not know."""
Make = Callable[[Any], Any]
"""Makes the value again of what stands behind such a tag."""
AS_THEY_ARE = (types.NoneType, bool, int, str)
PARTS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    tuple: ("tuple", list),
    torch.Size: ("size", list),
    dict: ("dict", lambda value: [list(pair) for pair in value.items()]),
    slice: ("slice", lambda value: [value.start, value.stop, value.step]),
    complex: ("complex", lambda value: [value.real, value.imag]),
    bytes: ("bytes", lambda value: base64.b64encode(value).decode()),
    types.EllipsisType: ("ellipsis", lambda value: None),
    torch.device: ("device", lambda value: value.type),
    torch.dtype: ("dtype", lambda value: _name_in_torch(value)),
    torch.layout: ("layout", lambda value: _name_in_torch(value)),
    torch.memory_format: ("memory_format", lambda value: _name_in_torch(value)),
}
"""For each type its tag, and the values that make one."""


def to_plain(value: Any, describe: Describe = lambda value: None) -> Any:
    """A value as plain data. Of a device the kind alone counts: ranks hold the same graphs on devices of their own.

    Args:
        describe: asked first of the value and of every value in it.

    Raises:
        Unportable: a value of another type than those above, or an enumeration that is not found by its name.
    """
    described = describe(value)
    if described is not None:
        return described
    kind = type(value)
    if kind in AS_THEY_ARE or kind is float and math.isfinite(value):
        return value
    if kind is float:
        return {"float": repr(value)}
    if kind is list:
        return [to_plain(part, describe) for part in value]
    if isinstance(value, enum.Enum):
        return {"enum": _member(value)}
    if kind not in PARTS:
        raise Unportable(f"{_shown(value)} is no value that plain data can say")
    tag, parts = PARTS[kind]
    return {tag: to_plain(parts(value), describe)}


def from_plain(plain: Any, device: torch.device | None = None, makers: Mapping[str, Make] | None = None) -> Any:
    """The value that `to_plain` described.

    Args:
        device: what a device of its kind becomes; others are without an index.
        makers: for each tag that ``describe`` gave, what makes the value again.

    Raises:
        Unportable: an unknown tag, or a name behind which nothing of that type is.
    """
    if isinstance(plain, list):
        return [from_plain(part, device, makers) for part in plain]
    if not isinstance(plain, dict):
        return plain
    if len(plain) != 1:
        raise Unportable(f"an object of the tags {sorted(plain)} stands for no value")
    ((tag, parts),) = plain.items()
    if makers is not None and tag in makers:
        return makers[tag](parts)
    if tag == "device":
        return device_of_kind(parts, device)
    if tag not in MAKERS:
        raise Unportable(f"there is no value of the tag {tag!r}")
    return MAKERS[tag](from_plain(parts, device, makers))


def device_of_kind(kind: str, device: torch.device | None) -> torch.device:
    """The device where it is of that kind, else that kind without an index."""
    return device if device is not None and device.type == kind else torch.device(kind)


def digest_of(plain: Any) -> str:
    """A digest of plain data: 64 hex digits, the same in every process."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def path_of(thing: Any) -> str:
    """The module and qualified name by which a class is found again.

    Raises:
        Unportable: something else is found there, or nothing: a class made in a function, say.
    """
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if _inner(sys.modules.get(str(module)), str(name)) is not thing:
        raise Unportable(f"{_shown(thing)} is not found by the name {name!r} in the module {module!r}")
    return f"{module}:{name}"


def thing_at(path: str) -> Any:
    """What a path of `path_of` leads to; its module is imported where it is not yet.

    Raises:
        Unportable: there is nothing.
    """
    module, _, name = path.partition(":")
    try:
        thing = _inner(importlib.import_module(module), name)
    except (ImportError, ValueError) as error:
        raise Unportable(f"{path} is not there: {error}") from error
    if thing is None:
        raise Unportable(f"{path} is not there: the module has no such name")
    return thing


def class_at(path: str) -> type:
    """The same where it must be a class."""
    thing = thing_at(path)
    if not isinstance(thing, type):
        raise Unportable(f"{path} is no class")
    return thing


def _inner(module: Any, name: str) -> Any:
    """What stands under a qualified name; None where nothing does."""
    inner = module
    for part in name.split("."):
        inner = getattr(inner, part, None)
    return inner


def _member(value: enum.Enum) -> list[str]:
    if type(value).__members__.get(value.name) is not value:
        raise Unportable(f"{value!r} is no single member of its class")
    return [path_of(type(value)), value.name]


def _made_member(parts: list[str]) -> enum.Enum:
    path, name = parts
    cls = class_at(path)
    if not issubclass(cls, enum.Enum) or name not in cls.__members__:
        raise Unportable(f"{path} has no member {name}")
    return cls.__members__[name]


def _name_in_torch(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _found_in_torch(kind: type) -> Make:
    def find(name: str) -> Any:
        value = getattr(torch, name, None)
        if not isinstance(value, kind):
            raise Unportable(f"this PyTorch has no {kind.__name__} {name}")
        return value

    return find


def _shown(value: Any, limit: int = 100) -> str:
    """A value in a few words; a tensor without its numbers."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, torch.Tensor):
        return f"a {kind}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # whatever a class of somebody else's does
        return f"an object of the type {kind}"
    return f"{text if len(text) <= limit else text[:limit] + '…'} of the type {kind}"


MAKERS: dict[str, Make] = {
    "float": float,
    "tuple": tuple,
    "size": torch.Size,
    "dict": dict,
    "slice": lambda parts: slice(*parts),
    "complex": lambda parts: complex(*parts),
    "bytes": base64.b64decode,
    "ellipsis": lambda parts: ...,
    "dtype": _found_in_torch(torch.dtype),
    "layout": _found_in_torch(torch.layout),
    "memory_format": _found_in_torch(torch.memory_format),
    "enum": _made_member,
}
"""For each tag what makes the value again."""
