"""Whether a module is as it was when it was described: one look at all that hangs on it, in place of a walk."""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from xdit_compile.ir.versions import version_of

from .attributes import VALUES, Seen, held_in, slots_of
from .in_place import own_class
from .signature import AROUND, HOOKS, TORCH_STATE, Fingerprint, fingerprint

HOLDERS = ("_parameters", "_buffers", "_modules", *HOOKS)
GATHERED = (list, collections.deque, set)
FIXED = (tuple, frozenset, functools.partial, types.MethodType)
"""What holds the same for as long as it lives; what can change stands further inside."""

Read = Callable[[], Iterable[Any]]


class Watch:
    """The fingerprint of a module, and all that it was taken of.

    Nothing is described anew to see whether it still holds: what was met is compared with what is there now, by
    identity, weights by where they lie besides, and other tensors by form and version. Lists of one kind are compared
    at once; what is looked at is kept small, since most of it lies in no cache when a call begins. Unseen are alone:
    plain numbers and texts replaced by equal ones, torch's own dicts of a module by others of equal content, a whole
    ``__dict__``, names of children and weights that change while these stay, and another shape of a weight that lies
    where it lay. A watch keeps alive what it was taken of.
    """

    def __init__(self, module: nn.Module):
        seen: Seen = {}
        self.fingerprint: Fingerprint = fingerprint(module, seen)
        self._identical: list[tuple[Read, list[Any]]] = []
        self._equal: list[tuple[Read, list[Any]]] = []
        modules, composites = list(module.modules()), [value for _, value in seen.values()]
        attributes = [each for one in modules for each in _attributes(one, one is module)]
        parts = [*(value for _, _, value in attributes), *(part for one in composites for part in parts_of(one))]
        self._watch_modules(modules, attributes)
        self._watch_objects([*modules, *(each for each in composites if _has_dict(each))], len(modules), composites)
        weights = [each for one in modules for each in (*one._parameters.values(), *one._buffers.values())]
        self._watch_tensors([each for each in weights if each is not None], parts)

    def same(self) -> bool:
        """Whether nothing was put in the place of another, added, taken away or written to since."""
        try:
            return (
                not any(self._empty)
                and all(_are(read(), before) for read, before in self._identical)
                and all(list(read()) == before for read, before in self._equal)
            )
        except Exception:  # objects say themselves whether they equal others, and may be unable to
            return False

    def _is(self, read: Read) -> None:
        self._identical.append((read, list(read())))

    def _equals(self, read: Read) -> None:
        self._equal.append((read, list(read())))

    def _watch_modules(self, modules: list[nn.Module], attributes: list[tuple[dict[str, Any], str, Any]]) -> None:
        """Watch what stands on modules themselves; of torch's own attributes those alone that decide anything.

        A module has a dozen others, each with a dict of its own, and looking at all of them takes longer than the rest.
        """
        root, rest = modules[0], [vars(each) for each in modules[1:]]
        self._is(lambda: [getattr(own_class(root), "forward", None)])
        self._is(lambda: [held.get(name) for held, name, _ in attributes])
        self._equals(lambda: [_counted(root)])
        self._equals(lambda: map(len, rest))
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for own in rest:
            names = ("training", *HOLDERS, *(name for name in own if name not in TORCH_STATE))
            alike.setdefault(names, []).append(own)
        groups = [(operator.itemgetter(*names), held) for names, held in alike.items()]
        self._equals(lambda: itertools.chain.from_iterable(map(get, held) for get, held in groups))

    def _watch_objects(self, objects: list[Any], first: int, composites: list[Any]) -> None:
        """Watch what modules, objects that come after them, and containers hold, where that can change."""
        held = [vars(each)[name] for each in objects[:first] for name in HOLDERS]
        own = [*map(vars, objects[first:]), *(each for each in composites if isinstance(each, dict))]
        self._empty = [each for each in (*held, *own) if not each]
        filled = [each for each in (*held, *own) if each]
        gathered = [each for each in composites if isinstance(each, GATHERED)]
        loose = [each for each in composites if _is_loose(each)]
        self._is(lambda: itertools.chain.from_iterable(own))
        self._is(lambda: itertools.chain.from_iterable(map(dict.values, filled)))
        self._is(lambda: itertools.chain.from_iterable(gathered))
        self._is(lambda: itertools.chain.from_iterable(map(parts_of, loose)))
        self._is(lambda: map(vars, objects[first:]))
        self._equals(lambda: map(len, gathered))
        self._equals(lambda: map(type, objects))

    def _watch_tensors(self, weights: list[torch.Tensor], parts: list[Any]) -> None:
        """Watch where weights lie, and form and values of what else hangs there."""
        plain = [each for each in parts if isinstance(each, torch.Tensor)]
        arrays = [each for each in parts if isinstance(each, np.ndarray)]
        placed = [each for each in weights if type(each) in (torch.Tensor, nn.Parameter)]
        formed = [*plain, *(each for each in weights if type(each) not in (torch.Tensor, nn.Parameter))]
        self._equals(lambda: map(torch.Tensor.data_ptr, placed))
        self._equals(lambda: [(each.shape, each.dtype, each.device) for each in formed])
        self._equals(lambda: [_written(each) for each in plain])
        self._equals(lambda: [(each.shape, each.dtype.str, each.tobytes()) for each in arrays])


def parts_of(value: Any) -> list[Any]:
    """What a container, function or object holds directly, names of attributes and keys included."""
    if isinstance(value, dict | types.MappingProxyType):
        return [member for entry in value.items() for member in entry]
    if isinstance(value, set | frozenset | list | tuple | collections.deque):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    code = [value.__code__] if isinstance(value, types.FunctionType) else []
    return [*code, *(member for entry in held_in(value) for member in entry)]


def _attributes(module: nn.Module, root: bool) -> list[tuple[dict[str, Any], str, Any]]:
    """What hangs on a module itself and is no plain value, with where it hangs."""
    attributes = vars(module)
    counted = _counted(module) if root else attributes
    return [
        (attributes, name, value)
        for name, value in counted.items()
        if name not in TORCH_STATE and value.__class__ not in VALUES
    ]


def _counted(root: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(root).items() if name not in AROUND}


def _has_dict(value: Any) -> bool:
    closed = (dict, *GATHERED, *FIXED, types.FunctionType, types.MappingProxyType)
    return not isinstance(value, closed) and hasattr(value, "__dict__")


def _is_loose(value: Any) -> bool:
    """Whether what a value holds has to be asked for part by part."""
    if isinstance(value, types.FunctionType | types.MappingProxyType):
        return True
    return not isinstance(value, (dict, *GATHERED, *FIXED)) and bool(slots_of(value))


def _are(found: Iterable[Any], before: list[Any]) -> bool:
    now = list(found)
    return len(now) == len(before) and all(map(operator.is_, now, before))


def _written(tensor: torch.Tensor) -> Any:
    """What equals a later one as long as nothing was written to a tensor; nothing, where writes are not counted."""
    version = version_of(tensor)
    return object() if version is None else version
