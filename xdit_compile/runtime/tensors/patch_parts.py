"""Patches of a tensor: here, on their way, or never here; and what is computed of them as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.passes.rules.piecewise import without_values

aten = torch.ops.aten


class Part:
    """One patch of a tensor.

    Args:
        like: the patch's shape and dtype, on the meta device.
        value: its values, where they are here.
        make: how to get them, where that can be done here; without it they are never here.
    """

    def __init__(
        self, like: torch.Tensor, value: torch.Tensor | None = None, make: Callable[[], torch.Tensor] | None = None
    ):
        self.like, self._value, self._make = like, value, make

    @classmethod
    def of(cls, value: torch.Tensor) -> Part:
        """A patch that is here."""
        return cls(_meta(value), value)

    @property
    def here(self) -> bool:
        """Whether the values can be had on this rank."""
        return self._value is not None or self._make is not None

    @property
    def settled(self) -> bool:
        """Whether the values are there already."""
        return self._value is not None

    def value(self) -> torch.Tensor:
        """The values; waits for them if need be."""
        if self._value is None:
            assert self._make is not None, "the values of this patch are on another rank"
            self._value, self._make = self._make(), None
        return self._value


@dataclasses.dataclass(frozen=True)
class View:
    """How a view comes from the tensor that it looks into: an operator, what else it takes, which of its results."""

    func: Any
    args: tuple
    kwargs: dict
    result: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of another tensor, or of one patch."""
        return pytree.tree_leaves(self.func(tensor, *self.args, **self.kwargs))[self.result]


def later(func: Callable[..., torch.Tensor], args: tuple) -> Part:
    """The one result of a function of patches."""
    (part,), _ = called(func, args, {})
    return part


def called(func: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[list[Part], Any]:
    """A function's results for one patch, and their containers: at once where all it needs is there, else later."""
    arguments = (args, kwargs)
    patches = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Part)]
    if all(patch.settled for patch in patches):
        plain_args, plain_kwargs = pytree.tree_map(_value, arguments)
        flat, spec = pytree.tree_flatten(func(*plain_args, **plain_kwargs))
        return [Part.of(value) for value in flat], spec
    meta_args, meta_kwargs = pytree.tree_map(_like, (args, without_values(kwargs)))
    flat, spec = pytree.tree_flatten(func(*meta_args, **meta_kwargs))
    if not all(patch.here for patch in patches):
        return [Part(_meta(like)) for like in flat], spec
    waiting = _Later(func, pytree.tree_map(_kept, arguments))
    return [Part(_meta(like), make=waiting.result(k)) for k, like in enumerate(flat)], spec


class _Later:
    """An operator that runs once, when the first of its results is asked for."""

    def __init__(self, func: Any, given: Any):
        self._func, self._given = func, given
        self._found: list[torch.Tensor] | None = None

    def result(self, at: int) -> Callable[[], torch.Tensor]:
        return lambda: self._values()[at]

    def _values(self) -> list[torch.Tensor]:
        if self._found is None:
            args, kwargs = pytree.tree_map(_value, self._given)
            self._found, self._given = pytree.tree_leaves(self._func(*args, **kwargs)), None
        return self._found


def device_after(kwargs: Mapping[str, Any], device: torch.device) -> torch.device:
    """Where an operator on tensors of a device leaves its results."""
    wanted = kwargs.get("device")
    return device if wanted is None else torch.empty(0, device=wanted).device


def functional(func: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The operator that returns what one in place writes, if there is one."""
    packet = getattr(aten, func._schema.name.split("::")[1].rstrip("_"), None)
    own: torch._ops.OpOverload | None = getattr(packet, func._overloadname, None)
    return own


def written(func: torch._ops.OpOverload) -> Callable[..., torch.Tensor]:
    """Returns what an operator in place would leave, by the operator that returns it: in the form of what is there."""

    def found(target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made: torch.Tensor = func(target, *args, **kwargs)
        return made.to(target.dtype).expand(target.shape)

    return found


def _value(leaf: Any) -> Any:
    return leaf.value() if isinstance(leaf, Part) else leaf


def _like(leaf: Any) -> Any:
    if isinstance(leaf, Part):
        return leaf.like
    return _meta(leaf) if isinstance(leaf, torch.Tensor) else leaf


def _kept(leaf: Any) -> Any:
    """An operand as it is now: others may change it in place before a patch arrives."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _meta(value: torch.Tensor) -> torch.Tensor:
    return value if value.is_meta else torch.empty(value.shape, dtype=value.dtype, device="meta")
