"""Puts methods in the place of an object's own by giving it a class derived from its own.

Python looks ``__call__`` up on the class, and libraries that hook a module wrap or replace the ``forward`` of the
instance: what stands in the class is reached through their wrappers, put on before or after, in any order. The derived
class has the name of the object's own and counts as equal to it, since libraries look classes up.
"""

from __future__ import annotations

import copyreg
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from xdit_compile.errors import UsageError
from xdit_compile.weights.released import refuse_released

HELD = "_xdit_compile"
"""The attribute under which an object keeps what stands in the place of its methods."""

Method = Callable[..., Any]


class Held:
    """What stands in the place of an object's methods, and those that were found on the instance itself."""

    def __init__(self, methods: Mapping[str, Method], found: Mapping[str, Method]):
        self.methods, self.found = dict(methods), dict(found)


def put_in_place(target: Any, methods: Mapping[str, Method]) -> None:
    """Have calls of some methods of an object go to others; `put_back` undoes it.

    A method that was replaced on the instance by something which never reaches the class's own is taken for the
    object's own: it is what `found_method` returns.
    """
    base = type(target)
    derived = _derived(base, tuple(methods))
    instance_methods = {name: method for name in methods if (method := _taken_off(target, base, name)) is not None}
    for name in methods:
        _rebind(target, name, base, types.MethodType(vars(derived)[name], target))
    object.__setattr__(target, HELD, Held(methods, instance_methods))
    object.__setattr__(target, "__class__", derived)


def put_back(target: Any) -> None:
    """Give an object its own class and methods back."""
    kept: Held = vars(target).pop(HELD)
    derived, base = type(target), own_class(target)
    object.__setattr__(target, "__class__", base)
    for name in kept.methods:
        _rebind(target, name, derived, types.MethodType(getattr(base, name), target))
    vars(target).update(kept.found)


def held(target: Any) -> dict[str, Method]:
    """What stands in the place of an object's methods, by their names."""
    found = vars(target).get(HELD) if hasattr(target, "__dict__") else None
    return {} if found is None else found.methods


def found_method(target: Any, name: str) -> Method:
    """An object's own method, whether or not another stands in its place."""
    kept = vars(target).get(HELD)
    if kept is None:
        return getattr(target, name)
    return kept.found.get(name) or types.MethodType(getattr(own_class(target), name), target)


def refuse_lost(target: Any, what: str) -> None:
    """See to it that calls of an object still come to what stands in the place of its methods.

    Raises:
        UsageError: a method was replaced on the instance since, by something that holds none of what it replaced.
    """
    for name in held(target):
        ours = types.MethodType(vars(type(target))[name], target)
        on_instance = vars(target).get(name)
        if on_instance is not None and not any(value == ours for _, _, value in _holders(target, name)):
            if not _reaches(on_instance, ours):
                raise UsageError(
                    f"{what}.{name} was replaced after parallelize by something that does not call what it replaced: "
                    "call xdit_compile.restore first, replace it, then parallelize again"
                )


def _reaches(method: Any, ours: Method, depth: int = 4) -> bool:
    """Whether a function holds a method, as wrappers do: in its closure, or among the arguments of a partial."""
    if method == ours:
        return True
    if depth == 0:
        return False
    parts = [getattr(method, "func", None), getattr(method, "__func__", None), getattr(method, "__wrapped__", None)]
    parts += [*getattr(method, "args", ()), *(getattr(method, "keywords", None) or {}).values()]
    for cell in getattr(method, "__closure__", None) or ():
        with suppress(ValueError):
            parts.append(cell.cell_contents)
    return any(_reaches(part, ours, depth - 1) for part in parts if callable(part))


def own_class(target: Any) -> type:
    """An object's own class, whether or not methods stand in the place of its own."""
    return getattr(type(target), "_xdit_compile_own", type(target))


@contextmanager
def as_it_was(target: Any) -> Iterator[None]:
    """Give an object its own class for a while, as code that looks at the object must not meet ours."""
    kept, derived = vars(target).pop(HELD, None), type(target)
    if kept is None:
        yield
        return
    object.__setattr__(target, "__class__", own_class(target))
    try:
        yield
    finally:
        object.__setattr__(target, "__class__", derived)
        object.__setattr__(target, HELD, kept)


def _derived(base: type, names: tuple[str, ...]) -> type:
    body: dict[str, Any] = {name: _dispatching(base, name) for name in names}
    body |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body |= {"__reduce_ex__": _reduce, "_xdit_compile_own": base}
    return _equal_to(type(base), base)(base.__name__, (base,), body)


def _equal_to(kind: type, base: type) -> Any:
    """A class of classes that are equal to ``base``."""

    def equal(one: Any, other: Any) -> bool:
        return getattr(other, "_xdit_compile_own", other) is base

    return type(kind.__name__, (kind,), {"__eq__": equal, "__hash__": lambda one: hash(base)})


def _dispatching(base: type, name: str) -> Method:
    method = getattr(base, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = vars(self).get(HELD)
        return method(self, *args, **kwargs) if kept is None else kept.methods[name](*args, **kwargs)

    return _not_compiled(call) if name == "forward" else call


def _not_compiled(call: Method) -> Method:
    import torch

    return torch.compiler.disable(call, reason="xdit_compile runs graphs of its own; use Plan(backend=...)")  # type: ignore[call-arg]


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles are of the object as it was: no ranks share them."""
    if isinstance(self, nn.Module):
        refuse_released(self)
    instance_methods = vars(self)[HELD].found if HELD in vars(self) else {}
    with as_it_was(self):
        function, arguments, *rest = self.__reduce_ex__(protocol)
        rest = [{**each, **instance_methods} if isinstance(each, dict) else each for each in rest]
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]
        function = arguments[0].__new__  # pickle refuses the other one for objects whose class is not the one it makes
    return (function, arguments, *rest)


def _taken_off(target: Any, base: type, name: str) -> Method | None:
    """A method that stands on the instance and leads nowhere else, taken off it."""
    if name not in vars(target) or any(_is(value, base, name, target) for _, _, value in _holders(target, name)):
        return None
    return vars(target).pop(name)


def _rebind(target: Any, name: str, before: type, method: Method) -> None:
    """Have wrappers on the instance that lead to a class's method lead to another."""
    for holder, key, value in list(_holders(target, name)):
        if _is(value, before, name, target):
            if holder is vars(target) and key == name:
                del holder[key]
            elif isinstance(holder, dict):
                holder[key] = method
            else:
                setattr(holder, key, method)


def _holders(target: Any, name: str) -> Iterator[tuple[Any, str, Any]]:
    """Where hooks of libraries keep the method that they wrap: the object, the key, and what is there."""
    state = vars(target)
    if name in state:
        yield state, name, state[name]
    if name != "forward":
        return
    if "_old_forward" in state:
        yield state, "_old_forward", state["_old_forward"]
    for reference in getattr(state.get("_diffusers_hook"), "_fn_refs", ()):
        for key in ("forward", "original_forward"):
            if (value := getattr(reference, key, None)) is not None:
                yield reference, key, value


def _is(value: Any, kind: type, name: str, target: Any) -> bool:
    return getattr(value, "__self__", None) is target and getattr(value, "__func__", None) is getattr(kind, name)
