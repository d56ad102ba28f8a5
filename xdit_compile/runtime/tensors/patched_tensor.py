"""Tensors in patches, some of which are not here yet, or never will be: another rank has them.

A denoiser that computes patch by patch answers before it is done. What pipelines and schedulers do with its result
until the next call is pointwise, or moves other dims than the one that is cut; that is done patch by patch, at once for
patches that are here and on arrival for the others. Anything else needs all patches, and gets them from the rank that
has them all: slower, never wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .patch_parts import Cut, Part, View, called, device_after, functional, later

aten = torch.ops.aten
READERS = ("numpy", "tolist", "__array__", "data_ptr", "untyped_storage", "__reduce_ex__", "__deepcopy__", "__repr__")


class PatchedTensor(torch.Tensor):
    """A tensor that is computed, and changed, patch by patch.

    A view of one in patches has no patches of its own: it takes them of its root, and writes them there. Once anything
    was given a view of all patches together, these are what counts, on every rank alike.
    """

    cut: Cut
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
    def __new__(cls, parts: Sequence[Part], cut: Cut, device: torch.device) -> PatchedTensor:
        shape = list(parts[0].like.shape)
        shape[len(shape) - cut.back] = cut.size
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].like.dtype, device=device)
        made.cut, made._own, made._whole, made._open, made._changes = cut, list(parts), None, False, 0
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
            self._own = [Part.of(self.cut.take(whole, at)) for at in range(len(self._own))]
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
            self._whole = self.cut.collect(self)
            self._own = [Part.of(self.cut.take(self._whole, at)) for at in range(len(self._own))]
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

    def _written(self, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """One patch of the root with that of this view written to its place."""
        whole = whole.clone()
        self._seen_through(whole).copy_(part)
        return whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in READERS:
            args, kwargs = pytree.tree_map(_opened, (args, kwargs))
        if func is torch.einsum and (found := _einsum(args, kwargs)) is not None:
            return found
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
        target = args[0] if args and isinstance(args[0], PatchedTensor) and func._schema.is_mutable else None
        if torch.Tag.inplace_view in func.tags:
            raise RuntimeError(f"{func} changes the form of a denoiser's result in place; do it to a clone")
        back = _back(func, args, kwargs)
        if back is not None and (target is None or not target.root._open):
            return by_patch(func, args, kwargs, back)
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


def by_patch(func: Any, args: tuple, kwargs: dict, back: int) -> Any:
    """Call an operator on each patch by itself; the result's cut dim is ``back`` from the end."""
    leaves = pytree.tree_leaves((args, kwargs))
    first = next(leaf for leaf in leaves if isinstance(leaf, PatchedTensor))
    inplace = isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable
    results = [_one(func, args, kwargs, first.cut, at, inplace) for at in range(len(first.parts))]
    if inplace:
        args[0].write([result[0][0] for result in results])
        return args[0]
    cut = dataclasses.replace(first.cut, back=back)
    _, spec = results[0]
    device = device_after(kwargs, first.device)
    made = [PatchedTensor([parts[at] for parts, _ in results], cut, device) for at in range(len(results[0][0]))]
    if isinstance(func, torch._ops.OpOverload) and func.is_view:
        first.look(made, func, args, kwargs)
    return pytree.tree_unflatten(made, spec)


def _one(func: Any, args: tuple, kwargs: dict, cut: Cut, at: int, inplace: bool) -> tuple[list[Part], Any]:
    """An operator's results for one patch: at once where all it needs is there, else as it arrives."""
    func = functional(func) if inplace else func
    given = pytree.tree_map(lambda leaf: _of_patch(leaf, cut, at), (args, kwargs))
    return called(func, *given)


def _of_patch(leaf: Any, cut: Cut, at: int) -> Any:
    """What one patch needs of an operand: the patch of it, or all where it has no position for each."""
    if isinstance(leaf, PatchedTensor):
        return leaf.parts[at]
    if isinstance(leaf, torch.Tensor) and leaf.ndim >= cut.back and leaf.shape[leaf.ndim - cut.back] == cut.size:
        return cut.take(leaf, at)
    return leaf


def _back(func: Any, args: tuple, kwargs: dict) -> int | None:
    """Where an operator leaves the cut dim, counted from the end; None where patches do not stay apart."""
    leaves = pytree.tree_leaves((args, kwargs))
    patched = [leaf for leaf in leaves if isinstance(leaf, PatchedTensor)]
    first = patched[0]
    if any(leaf.cut.back != first.cut.back or not _alike(leaf.cut, first.cut) for leaf in patched):
        return None
    if torch.Tag.pointwise in func.tags or func in (aten.copy_.default, aten.where.self):
        return _pointwise(func, args, leaves, first)
    rule = _RULES.get(func)
    return rule(first, args, kwargs) if rule is not None else None


def _alike(one: Cut, other: Cut) -> bool:
    return one.positions is other.positions


def _pointwise(func: Any, args: tuple, leaves: list[Any], first: PatchedTensor) -> int | None:
    plain = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, PatchedTensor)]
    back = first.cut.back
    fits = all(leaf.ndim < back or leaf.shape[leaf.ndim - back] in (1, first.cut.size) for leaf in plain)
    if func._schema.is_mutable and not isinstance(args[0], PatchedTensor):
        return None
    return back if fits else None


def _dim(tensor: PatchedTensor, dim: int) -> int:
    return dim % tensor.ndim


def _own(tensor: PatchedTensor) -> int:
    return tensor.ndim - tensor.cut.back


def _unchanged(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
    return tensor.cut.back


def _along(at: int, default: int = 0) -> Callable[[PatchedTensor, tuple, dict], int | None]:
    """Of an operator that cuts or joins along one dim, which must not be the one that patches lie along."""

    def rule(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
        dim = args[at] if len(args) > at else kwargs.get("dim", default)
        return None if _dim(tensor, dim) == _own(tensor) else tensor.cut.back

    return rule


def _joined(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    fits = all(each.ndim == tensor.ndim and each.shape[_own(tensor)] == tensor.cut.size for each in args[0])
    return tensor.cut.back if fits and _dim(tensor, dim) != _own(tensor) else None


def _stacked(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % (tensor.ndim + 1)
    if any(each.shape != tensor.shape for each in args[0]):
        return None
    return tensor.cut.back + (dim > _own(tensor))


def _removed(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
    dim = _dim(tensor, args[1] if len(args) > 1 else kwargs.get("dim", 0))
    return None if dim == _own(tensor) else tensor.cut.back - (dim > _own(tensor))


def _squeezed(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
    dim = _dim(tensor, args[1])
    return tensor.cut.back if tensor.shape[dim] != 1 else _removed(tensor, args, kwargs)


def _inserted(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
    dim = args[1] % (tensor.ndim + 1)
    return tensor.cut.back + (dim > _own(tensor))


def _permuted(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
    order = [_dim(tensor, dim) for dim in args[1]]
    return tensor.ndim - order.index(_own(tensor))


def _swapped(tensor: PatchedTensor, args: tuple, kwargs: dict) -> int | None:
    order = list(range(tensor.ndim))
    one, two = (_dim(tensor, dim) for dim in args[1:3])
    order[one], order[two] = order[two], order[one]
    return tensor.ndim - order.index(_own(tensor))


_DRAWN = (aten.randn_like.default, aten.rand_like.default, aten.empty_like.default)
"""Operators that read no values: every rank draws the same."""

_RULES: dict[Any, Callable[[PatchedTensor, tuple, dict], int | None]] = {
    aten._to_copy.default: _unchanged,
    aten.clone.default: _unchanged,
    aten.detach.default: _unchanged,
    aten.alias.default: _unchanged,
    aten.zeros_like.default: _unchanged,
    aten.ones_like.default: _unchanged,
    aten.slice.Tensor: _along(1),
    aten.split.Tensor: _along(2),
    aten.split_with_sizes.default: _along(2),
    aten.select.int: _removed,
    aten.unbind.int: _removed,
    aten.squeeze.dim: _squeezed,
    aten.unsqueeze.default: _inserted,
    aten.cat.default: _joined,
    aten.stack.default: _stacked,
    aten.permute.default: _permuted,
    aten.transpose.int: _swapped,
}


def _einsum(args: tuple, kwargs: dict) -> Any:
    """A contraction of other dims than the cut one, which stands last but for what follows it; None for any other."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    patched = [operand for operand in operands if isinstance(operand, PatchedTensor)]
    if not isinstance(equation, str) or len(patched) != 1 or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").split("->")
    term = terms.split(",")[next(at for at, each in enumerate(operands) if each is patched[0])]
    back = patched[0].cut.back
    if not term.endswith("...") or not result.endswith("...") or _own(patched[0]) < len(term) - 3:
        return None

    def one(part: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, *(part if each is patched[0] else each.to(part.device) for each in operands))

    return by_patch(one, (patched[0],), {}, back)
