"""Whatever may hang on a module as plain data: containers, objects and functions, as deep as they go."""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import json
import logging
import pathlib
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from xdit_compile.capture.state.attributes import POINTER, held_in, slots_of
from xdit_compile.capture.state.in_place import HELD, own_class
from xdit_compile.ir.digest import digest_tensors

from .unportable import Unportable

ADDRESSES = frozenset(
    "_name_or_path name_or_path base_model_name_or_path _commit_hash _diffusers_version _use_default_values".split()
)
"""Attributes and keys by which libraries remember where a model was loaded from and by what; they decide nothing."""
BARE = frozenset({str, int, type(None)})
SHORT = frozenset({bool, float, complex, range, slice, type(...), torch.dtype, torch.layout, torch.memory_format})
"""Types whose text says all."""
SEQUENCES = (list, tuple, collections.deque)
BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, type(len))
MAKERS_OF_FORWARD = frozenset({"accelerate.hooks", "diffusers.hooks.hooks"})
"""Modules whose functions put functions of their own in the place of forward: those are found by their code."""
LOCAL = ".<locals>."
OWN = "xdit_compile"
STATEFUL = {
    types.GeneratorType: "a generator, which is used up",
    torch.Generator: "a random generator",
}


class Describing:
    """A description in the making: the objects that were met, and the place that is looked at now, for messages.

    An object that is met again is no more than its number. What modules and weights are is for a subclass to say.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[int, Any]] = {}
        self._class_names: dict[type, str] = {}
        self._path, self._steps = "", [""]

    def attribute(self, path: str, name: str, value: Any) -> Any:
        """A value that hangs on the module at ``path`` under ``name``.

        Raises:
            Unportable: another process would not find it again.
        """
        if value.__class__ in BARE:
            return value
        self.at(path, name)
        return self._value(value)

    def at(self, path: str, name: str) -> None:
        """From here on an attribute of a module is looked at."""
        self._path, self._steps = path, [name]

    def leave(self) -> tuple[str, list[str]]:
        """The place that is looked at, to go back to."""
        return self._path, self._steps

    def go_back(self, place: tuple[str, list[str]]) -> None:
        """Go on at a place that was left."""
        self._path, self._steps = place

    def where(self) -> str:
        """The place that is looked at, in words."""
        return f"{''.join(self._steps)} of {self._path or 'the module itself'}"

    def module(self, module: nn.Module) -> Any:
        """A module that is met among values."""
        raise NotImplementedError

    def weight(self, tensor: torch.Tensor) -> str | None:
        """The name of a tensor that is a parameter or buffer; None for any other."""
        raise NotImplementedError

    def known_module(self, value: Any) -> bool:
        """Whether a value is a module that has a path."""
        raise NotImplementedError

    def class_name(self, kind: type) -> str:
        """The name by which a class is found again.

        Raises:
            Unportable: it is not found by its name.
        """
        if kind not in self._class_names:
            if kind is not type(None) and definition(kind.__module__, kind.__qualname__) is not kind:
                self.refuse(f"a {kind.__qualname__}, a class that is not found under that name in {kind.__module__}")
            self._class_names[kind] = f"{kind.__module__}:{kind.__qualname__}"
        return self._class_names[kind]

    def form(self, tensor: torch.Tensor) -> list[Any]:
        """Shape, dtype and kind of device of a tensor, and strides where it is not contiguous."""
        plain = tensor.layout == torch.strided
        strides = [] if plain and tensor.is_contiguous() else [list(tensor.stride()) if plain else str(tensor.layout)]
        return [list(tensor.shape), str(tensor.dtype), tensor.device.type, *strides]

    def subclass(self, tensor: torch.Tensor, plain: tuple[type, ...]) -> list[Any]:
        """What a tensor is besides a plain one: its class, if it has one of its own, and what hangs on it."""
        hangs = {name: item for name, item in getattr(tensor, "__dict__", {}).items() if not name.startswith("_hf_")}
        if type(tensor) in plain and not hangs:
            return []
        return [self.class_name(type(tensor)), self._members(hangs.items(), ".")]

    def refuse(self, what: str) -> Any:
        """Say that what is looked at cannot be found again.

        Raises:
            Unportable: always.
        """
        raise Unportable(f"{self.where()} is {what}")

    def _value(self, value: Any) -> Any:
        kind = value.__class__
        if kind in BARE:
            return value
        if kind in SHORT:
            return {kind.__name__: repr(value)}
        for types_, describe in FORMS:
            if isinstance(value, types_):
                return describe(self, value)
        if (known := self._numbers.get(id(value))) is not None:
            return {"again": known[0]}
        self._numbers[id(value)] = (len(self._numbers), value)
        for types_, describe in NUMBERED:
            if isinstance(value, types_):
                return describe(self, value)
        return self._object(value)

    def _inside(self, step: str, value: Any) -> Any:
        if value.__class__ in BARE:
            return value
        self._steps.append(step)
        described = self._value(value)
        self._steps.pop()
        return described

    def _members(self, members: Any, sign: str = "") -> dict[str, Any]:
        """What stands under names, in no order."""
        return {name: self._inside(f".{name}", item) for name, item in members if name not in (*ADDRESSES, HELD)}

    def _object(self, value: Any) -> Any:
        kind = own_class(value)
        if (reason := next((why for each, why in STATEFUL.items() if isinstance(value, each)), None)) is not None:
            self.refuse(reason)
        slots = len(slots_of(value))
        hidden = kind.__basicsize__ - object.__basicsize__ - POINTER * slots
        if hidden > 2 * POINTER or not (kind.__dictoffset__ or slots):
            self.refuse(f"a {kind.__module__}.{kind.__qualname__}, which does not show what it holds")
        return {"object": self.class_name(kind), "holds": self._members(held_in(value))}

    def _tensor(self, tensor: torch.Tensor) -> Any:
        if (name := self.weight(tensor)) is not None:
            return {"weight": name}
        return {"tensor": [*self.form(tensor), *self.subclass(tensor, (torch.Tensor,)), digest_tensors([tensor])]}

    def _array(self, array: np.ndarray) -> Any:
        if array.dtype.hasobject:
            return {"array": self._inside(".tolist()", array.tolist())}
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return {"array": [list(array.shape), array.dtype.str, digest]}

    def _number_or_text(self, value: Any) -> Any:
        """One of a class of its own, whose own ``__repr__`` may say less."""
        plain = next(kind for kind in (str, int, float, complex) if isinstance(value, kind))
        return {"value": [self.class_name(type(value)), plain.__repr__(value), self._members(held_in(value))]}

    def _enum(self, member: enum.Enum) -> Any:
        return {"enum": [self.class_name(type(member)), member.name, repr(member.value) if member.name is None else ""]}

    def _class(self, kind: type) -> Any:
        return {"class": self.class_name(getattr(kind, "_xdit_compile_own", kind))}

    def _sequence(self, value: Any) -> Any:
        items = [self._inside(f"[{place}]", item) for place, item in enumerate(value)]
        return self._container(value, items, (list, tuple, collections.deque, torch.Size))

    def _set(self, value: Any) -> Any:
        items = sorted((self._inside("{}", item) for item in value), key=_in_order)
        return self._container(value, items, (set, frozenset))

    def _dict(self, value: Any) -> Any:
        items = [
            [self._inside(" (a key)", key), self._inside(f"[{key!r}]" if isinstance(key, str | int) else "[...]", item)]
            for key, item in value.items()
            if not (isinstance(key, str) and key in ADDRESSES)
        ]
        return self._container(value, items, (dict, types.MappingProxyType))

    def _container(self, value: Any, items: list[Any], plain: tuple[type, ...]) -> Any:
        """What a container holds, and as what a further class it is, with what hangs on it."""
        kind = type(value)
        described: dict[str, Any] = {kind.__name__: items}
        if kind not in plain:
            described["class"] = self.class_name(kind)
            described["holds"] = self._members(held_in(value))
        for name in ("maxlen", "default_factory"):
            if getattr(value, name, None) is not None:
                described[name] = self._inside(f".{name}", getattr(value, name))
        return described

    def _method(self, method: types.MethodType) -> Any:
        function, owner = method.__func__, method.__self__
        if own_class(owner) is not type(owner) and vars(type(owner)).get(function.__name__) is function:
            function = getattr(own_class(owner), function.__name__)
        return {"method": [self._inside("", function), self._inside(".__self__", owner)]}

    def _partial(self, partial: functools.partial) -> Any:
        parts = [("func", partial.func), ("args", partial.args), ("keywords", partial.keywords)]
        return {"partial": [self._inside(f".{name}", part) for name, part in parts]}

    def _function(self, function: types.FunctionType) -> Any:
        name = name_of(function)
        if name is None:
            self.refuse(_what(function))
        members = {key: item for key, item in held_in(function) if key != "__wrapped__" and item is not None}
        return {"function": name, **({"holds": self._members(members.items())} if members else {})}

    def _builtin(self, function: Any) -> Any:
        owner = getattr(function, "__objclass__", getattr(function, "__self__", None))
        if owner is None:
            return {"builtin": f"{function.__module__}:{function.__qualname__}"}
        return {"builtin": [self._inside(".__self__", owner), function.__name__]}

    def _weak(self, reference: weakref.ref) -> Any:
        target = reference()
        if not isinstance(target, nn.Module) or not self.known_module(target):
            self.refuse(f"a weak reference to a {type(target).__qualname__}, which is no module of the same tree")
        return {"weakly": self._value(target)}


def is_ours(value: Any) -> bool:
    """Whether a value is a function of this package, as stand on modules in the place of their own."""
    function = value.func if isinstance(value, functools.partial) else value
    function = function.__func__ if isinstance(function, types.MethodType) else function
    return isinstance(function, types.FunctionType) and function.__module__.partition(".")[0] == OWN


def definition(module: str | None, qualname: str) -> Any:
    """What stands under a name in a module that is loaded; None where nothing does. No code of others runs for it."""
    here = sys.modules.get(str(module))
    for step in qualname.split("."):
        kinds = here.__mro__ if isinstance(here, type) else (here,)
        here = next((vars(kind)[step] for kind in kinds if step in getattr(kind, "__dict__", {})), None)
    return here


def name_of(function: types.FunctionType) -> str | None:
    """The name by which a function is found again, with its place among those that wrap one another; None for none."""
    name = f"{function.__module__}:{function.__qualname__}"
    if LOCAL in function.__qualname__:
        return name if function.__module__ in MAKERS_OF_FORWARD and _is_made_there(function) else None
    for place, each in enumerate(_layers(definition(function.__module__, function.__qualname__))):
        if each is function:
            return f"{name}#{place}" if place else name
    return None


def _layers(defined: Any, most: int = 16) -> Iterator[Any]:
    """What a definition consists of: itself, what it wraps, and functions that it encloses, from the outside."""
    pending, count = [defined], 0
    while pending and count < most:
        layer, count = pending.pop(0), count + 1
        yield layer
        inner = [getattr(layer, name, None) for name in ("__func__", "fget", "func", "__wrapped__")]
        if isinstance(layer, types.FunctionType):
            inner += [value for _, value in held_in(layer)]
        pending += [each for each in inner if callable(each) or isinstance(each, staticmethod | classmethod)]


def _is_made_there(function: types.FunctionType) -> bool:
    """Whether a function's code is what the function of its name, outside of it, makes functions of."""
    outer, *inner = function.__qualname__.split(LOCAL)
    code = getattr(definition(function.__module__, outer), "__code__", None)
    for name in inner:
        constants = getattr(code, "co_consts", ())
        code = next((each for each in constants if isinstance(each, types.CodeType) and each.co_name == name), None)
    return code is function.__code__


def _what(function: types.FunctionType) -> str:
    name, module = function.__qualname__, function.__module__
    if function.__name__ == "<lambda>":
        return f"a lambda ({name} of {module}), which another process cannot find by name: make it a function"
    if LOCAL in name:
        return f"{name} of {module}, a function made inside of another one, which cannot be found by name"
    return f"{name}, a function that is not found under that name in {module}"


def _in_order(described: Any) -> str:
    return json.dumps(described, sort_keys=True)


Form = tuple[Any, Callable[[Describing, Any], Any]]
FORMS: tuple[Form, ...] = (
    (bytes, lambda describing, value: {"bytes": hashlib.sha256(value).hexdigest()}),
    (torch.Tensor, Describing._tensor),
    (enum.Enum, Describing._enum),
    (torch.device, lambda describing, value: {"device": value.type}),
    (nn.Module, lambda describing, value: describing.module(value)),
    (type, Describing._class),
    (tuple, Describing._sequence),
    (frozenset, Describing._set),
    (np.ndarray, Describing._array),
    (np.generic, lambda describing, value: {"number": [value.dtype.str, value.tobytes().hex()]}),
    (types.ModuleType, lambda describing, value: {"python module": value.__name__}),
    ((torch._ops.OpOverload, torch._ops.OpOverloadPacket, np.dtype), lambda describing, value: {"op": str(value)}),
    (pathlib.PurePath, lambda describing, value: {"path": str(value)}),
    (logging.Logger, lambda describing, value: {"logger": value.name}),
    (re.Pattern, lambda describing, value: {"pattern": [value.pattern, value.flags]}),
    (weakref.ref, Describing._weak),
    (types.MethodType, Describing._method),
    (BUILTINS, Describing._builtin),
    ((str, int, float, complex), Describing._number_or_text),
)
"""How values are described that say all themselves, so that it does not count whether two are the same one."""
NUMBERED: tuple[Form, ...] = (
    ((dict, types.MappingProxyType), Describing._dict),
    (set, Describing._set),
    (SEQUENCES, Describing._sequence),
    (functools.partial, Describing._partial),
    (types.FunctionType, Describing._function),
)
