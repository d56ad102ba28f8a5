"""Tensors whose values come later: a call's result that may be looked at, cut and scaled before it is computed.

Views and pointwise operators on a deferred tensor are recorded; anything else asks for the values first. What was
recorded runs in its order as soon as they are there: a later change in place is not seen by results made before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.passes.rules.piecewise import without_values

from .patch_parts import device_after

aten = torch.ops.aten
_ALSO = (
    aten._to_copy.default,
    aten.clone.default,
    aten._unsafe_view.default,
    aten.cat.default,
    aten.stack.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
)
_READERS = ("numpy", "tolist", "__array__", "data_ptr", "untyped_storage", "__reduce_ex__", "__deepcopy__", "__repr__")


class Source:
    """Where values come from; ``force`` makes them, then runs what was recorded meanwhile."""

    def __init__(self, force: Callable[[], None]):
        self._force = force
        self._records: list[Callable[[], None]] = []
        self._results: list[Deferred] = []

    def deferred(self, likes: Sequence[torch.Tensor]) -> list[Deferred]:
        """Tensors of the shapes, dtypes and devices of ``likes`` whose values this source will give."""
        self._results = [Deferred(like, self) for like in likes]
        return self._results

    def fill(self, values: Sequence[torch.Tensor]) -> None:
        """Give the values, and run what was recorded, in its order."""
        for result, value in zip(self._results, values, strict=True):
            result.settle(value)
        records, self._records = self._records, []
        for record in records:
            record()

    def force(self) -> None:
        """Make the values now; `fill` is called on the way."""
        self._force()

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Remember a call of an operator; returns its deferred results."""
        args, kwargs = pytree.tree_map(_kept, (args, kwargs))
        outs = func(*pytree.tree_map(_meta, args), **pytree.tree_map(_meta, without_values(kwargs)))
        flat, spec = pytree.tree_flatten(outs)
        own = next(leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Deferred))
        made = [Deferred(leaf, self, device_after(kwargs, own)) for leaf in flat]

        def run() -> None:
            plain_args, plain_kwargs = pytree.tree_map(values_of, (args, kwargs))
            for out, value in zip(made, pytree.tree_leaves(func(*plain_args, **plain_kwargs)), strict=True):
                out.settle(value)

        self._records.append(run)
        return pytree.tree_unflatten(made, spec)


class Deferred(torch.Tensor):
    """A tensor that knows its shape, dtype and device, and gets its values when they are needed."""

    _source: Source
    _like: torch.Tensor
    _value: torch.Tensor | None

    @staticmethod
    def __new__(cls, like: torch.Tensor, source: Source, device: torch.device | None = None) -> Deferred:
        made = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device or like.device
        )
        made._source, made._value = source, None
        made._like = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
        return made

    @property
    def settled(self) -> bool:
        """Whether the values are there."""
        return self._value is not None

    @property
    def like(self) -> torch.Tensor:
        """A tensor on the meta device of the same form."""
        return self._like

    def settle(self, value: torch.Tensor) -> None:
        """Give the values."""
        self._value = value

    def value(self) -> torch.Tensor:
        """The values; makes them if need be."""
        if self._value is None:
            self._source.force()
        assert self._value is not None, "forcing a deferred tensor must settle it"
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in _READERS:
            args, kwargs = pytree.tree_map(values_of, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        pending = [
            leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Deferred) and not leaf.settled
        ]
        sources = {id(leaf._source): leaf._source for leaf in pending}
        if len(sources) == 1 and _recordable(func):
            return next(iter(sources.values())).record(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise RuntimeError(
                f"{func} changes the shape of a denoiser's deferred result in place, which is not supported"
            )
        args, kwargs = pytree.tree_map(values_of, (args, kwargs))
        return func(*args, **kwargs)


def values_of(leaf: Any) -> Any:
    """The values of a deferred tensor; anything else is itself."""
    return leaf.value() if isinstance(leaf, Deferred) else leaf


def _kept(leaf: Any) -> Any:
    """An operand as it is now: others may be changed in place before the record runs."""
    if isinstance(leaf, Deferred):
        return leaf if not leaf.settled else leaf.value().clone()
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _meta(leaf: Any) -> Any:
    if isinstance(leaf, Deferred):
        return leaf.like
    if isinstance(leaf, torch.Tensor):
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return leaf


def _recordable(func: Any) -> bool:
    if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return func.is_view or torch.Tag.pointwise in func.tags or func in _ALSO
