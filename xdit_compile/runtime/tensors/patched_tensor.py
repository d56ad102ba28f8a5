"""Tensors in patches, some of which are not here yet, or never will be: another rank has them.

A denoiser that computes patch by patch answers before it is done. What pipelines and schedulers do with its result
until the next call is pointwise, or moves other dims than the one that is cut; that is done patch by patch, at once for
patches that are here and on arrival for the others. Which operators these are is asked of their rules. Anything else
needs all patches, and gets them from the rank that has them all: slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from xdit_compile.ir.patch_layout import PatchLayout
from xdit_compile.passes.rules.piecewise import Operand, Piecewise, piecewise

from .patch_parts import Part, View, called, device_after, functional, later, written

aten = torch.ops.aten
READERS = ("numpy", "tolist", "__array__", "data_ptr", "untyped_storage", "__reduce_ex__", "__deepcopy__", "__repr__")


class PatchedTensor(torch.Tensor):
    """A tensor that is computed, and changed, patch by patch.

    A view of one in patches has no patches of its own: it takes them of its root, and writes them there. Once anything
    was given a view of all patches together, these are what counts, on every rank alike.
    """

    patch_layout: PatchLayout
    _collect: Callable[[PatchedTensor], torch.Tensor]
    """Gets all patches, on every rank."""
    _own: list[Part]
    _whole: torch.Tensor | None
    _open: bool
    """Whether somebody may see, and write to, all patches together."""
    _changes: int
    _root: PatchedTensor | None
    _views: tuple[View, ...]
    _seen: int
    """How many changes of the root the patches here have in them."""

    @staticmethod
    def __new__(
        cls,
        parts: Sequence[Part],
        layout: PatchLayout,
        device: torch.device,
        collect: Callable[[PatchedTensor], torch.Tensor],
    ) -> PatchedTensor:
        shape = list(parts[0].like.shape)
        shape[len(shape) - layout.back] = layout.size
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].like.dtype, device=device)
        made.patch_layout, made._collect = layout, collect
        made._own, made._whole, made._open, made._changes = list(parts), None, False, 0
        made._root, made._views, made._seen = None, (), 0
        return made

    @property
    def root(self) -> PatchedTensor:
        """What this is a view of, or itself."""
        return self if self._root is None else self._root

    @property
    def parts(self) -> list[Part]:
        """The patches as they are now."""
        self._renew()
        return self._own

    def _renew(self) -> None:
        root = self.root
        if root._open:
            whole = self.in_place()
            self._own = [Part.of(self.patch_layout.take(whole, at)) for at in range(len(self._own))]
        elif self._seen != root._changes:
            self._own = [later(self._seen_through, (part,)) for part in root._own]
            self._whole, self._seen = None, root._changes

    def _seen_through(self, tensor: torch.Tensor) -> torch.Tensor:
        for view in self._views:
            tensor = view.of(tensor)
        return tensor

    def whole(self) -> torch.Tensor:
        """All patches, on every rank; every rank asks at the same point."""
        if self.root._open:
            return self.in_place()
        self._renew()
        if self._whole is None:
            self._whole = self._collect(self)
            self._own = [Part.of(self.patch_layout.take(self._whole, at)) for at in range(len(self._own))]
        return self._whole

    def in_place(self) -> torch.Tensor:
        """All patches, in memory that whoever has a view of them reads and writes."""
        root = self.root
        if not root._open:
            root._whole, root._open = root.whole(), True
        assert root._whole is not None
        return self._seen_through(root._whole)

    def look(self, made: Sequence[PatchedTensor], func: Any, args: tuple, kwargs: dict) -> None:
        """Make the results of an operator views of this."""
        for at, each in enumerate(made):
            each._root, each._views = self.root, (*self._views, View(func, args[1:], kwargs, at))
            each._seen = self.root._changes

    def write(self, parts: list[Part]) -> None:
        """Put other patches in the place of these, and of those that this is a view of."""
        root = self.root
        if self is not root:
            parts = [later(self._written, pair) for pair in zip(root._own, parts, strict=True)]
        root._own, root._whole, root._changes = parts, None, root._changes + 1
        root._seen = root._changes

    def _written(self, whole: torch.Tensor, patch: torch.Tensor) -> torch.Tensor:
        """One patch of the root with that of this view written to its place."""
        whole = whole.clone()
        self._seen_through(whole).copy_(patch)
        return whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in READERS:
            args, kwargs = pytree.tree_map(_opened, (args, kwargs))
        if func is torch.einsum and isinstance(args[0], str):
            operands = args[1:] if isinstance(args[1], torch.Tensor) else args[1]
            func, args = aten.einsum.default, (args[0], list(operands))
            if (how := _how(func, args, kwargs)) is not None:
                return _by_patch(func, args, kwargs, how)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWN:
            plain = torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
            return func(plain, *args[1:], **kwargs)
        target = args[0] if args and isinstance(args[0], PatchedTensor) and _is_in_place(func) else None
        if torch.Tag.inplace_view in func.tags:
            raise RuntimeError(f"{func} changes the form of a denoiser's result in place; do it to a clone")
        how = _how(func, args, kwargs)
        if how is not None and (target is None or not target.root._open):
            return _by_patch(func, args, kwargs, how)
        reach = _opened if target is not None or func.is_view else whole_of
        first, *rest = args
        found = func(reach(first), *pytree.tree_map(whole_of, rest), **pytree.tree_map(whole_of, kwargs))
        return found if target is None else target


def whole_of(leaf: Any) -> Any:
    """All patches of a tensor in patches; anything else is itself."""
    return leaf.whole() if isinstance(leaf, PatchedTensor) else leaf


def _opened(leaf: Any) -> Any:
    """The same for whoever may write to it, or look into it later."""
    return leaf.in_place() if isinstance(leaf, PatchedTensor) else leaf


def _is_in_place(func: torch._ops.OpOverload) -> bool:
    return func._schema.is_mutable and func._schema.name.endswith("_")


def _how(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Piecewise | None:
    """How patches go through an operator; None where they do not stay apart."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    patched = [leaf for leaf in leaves if isinstance(leaf, PatchedTensor)]
    if any(leaf.patch_layout.positions != patched[0].patch_layout.positions for leaf in patched[1:]):
        return None
    asked: torch._ops.OpOverload | None = func
    if func._schema.is_mutable:
        asked = functional(func) if _is_in_place(func) and isinstance(args[0], PatchedTensor) else None
    if asked is None or torch.Tag.nondeterministic_seeded in asked.tags:
        return None
    counts = tuple(map(len, patched[0].patch_layout.positions))
    how = piecewise(asked, tuple(map(_known, leaves)), spec, counts)
    in_form = how is None or asked is func or how.results == (args[0].patch_layout.back,)
    return how if in_form else None


def _known(leaf: Any) -> Any:
    """What of an argument decides how patches go through an operator."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    back = leaf.patch_layout.back if isinstance(leaf, PatchedTensor) else None
    return Operand(tuple(leaf.shape), leaf.dtype, back)


def _by_patch(func: torch._ops.OpOverload, args: tuple, kwargs: dict, how: Piecewise) -> Any:
    """Call an operator on each patch by itself."""
    first = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, PatchedTensor))
    function: Callable[..., Any] = func
    if _is_in_place(func) and (returning := functional(func)) is not None:
        function = written(returning)
    patches = range(len(first.parts))
    results = [called(function, *_of_patch(args, kwargs, how, first.patch_layout, patch)) for patch in patches]
    if function is not func:
        args[0].write([parts[0] for parts, _ in results])
        return args[0]
    device, (_, spec) = device_after(kwargs, first.device), results[0]
    made = [
        PatchedTensor(
            [parts[k] for parts, _ in results],
            first.patch_layout.along(back),
            device,
            first._collect,
        )
        for k, back in enumerate(how.results)
    ]
    if func.is_view:
        first.look(made, func, args, kwargs)
    return pytree.tree_unflatten(made, spec)


def _of_patch(args: tuple, kwargs: dict, how: Piecewise, layout: PatchLayout, patch: int) -> tuple[tuple, dict]:
    """What one patch needs of the arguments: the patch of each, or all where it has no position for each."""
    backs = iter(how.operands)

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        back = next(backs)
        if isinstance(leaf, PatchedTensor):
            return leaf.parts[patch]
        return leaf if back is None else layout.take(leaf, patch, back)

    taken_args, taken_kwargs = pytree.tree_map(taken, (args, kwargs))
    return taken_args, taken_kwargs


_DRAWN = (aten.randn_like.default, aten.rand_like.default, aten.empty_like.default)
"""Operators that read no values: every rank draws the same."""
