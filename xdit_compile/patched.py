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

aten = torch.ops.aten
Collect = Callable[["PatchedTensor"], torch.Tensor]
READERS = ("numpy", "tolist", "__array__", "data_ptr", "untyped_storage", "__reduce_ex__", "__deepcopy__", "__repr__")


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
class Cut:
    """How patches lie in a tensor: the positions of each, along the dim that is ``back`` from the end."""

    positions: tuple[torch.Tensor, ...]
    back: int
    collect: Collect

    @property
    def size(self) -> int:
        """Positions of all patches."""
        return sum(len(each) for each in self.positions)

    def take(self, whole: torch.Tensor, at: int) -> torch.Tensor:
        """One patch of a whole tensor."""
        positions = self.positions[at]
        dim = whole.ndim - self.back
        first, count = int(positions[0]) if len(positions) else 0, len(positions)
        if torch.equal(positions, torch.arange(first, first + count)):
            return whole.narrow(dim, first, count)
        return whole.index_select(dim, positions.to(whole.device))

    def empty(self, likes: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """Room for a whole tensor whose patches are like these."""
        shape = list(likes[0].shape)
        shape[len(shape) - self.back] = self.size
        return torch.empty(shape, dtype=likes[0].dtype, device=device)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole from its patches."""
        order = torch.argsort(torch.cat(self.positions))
        whole = torch.cat(list(parts), parts[0].ndim - self.back)
        if torch.equal(order, torch.arange(len(order))):
            return whole
        return whole.index_select(whole.ndim - self.back, order.to(whole.device))


class PatchedTensor(torch.Tensor):
    """A tensor that is computed, and changed, patch by patch."""

    parts: list[Part]
    cut: Cut
    _whole: torch.Tensor | None
    _shared: bool
    """Whether another tensor is a view of this one, or this one of another."""

    @staticmethod
    def __new__(cls, parts: Sequence[Part], cut: Cut, device: torch.device) -> PatchedTensor:
        shape = list(parts[0].like.shape)
        shape[len(shape) - cut.back] = cut.size
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=parts[0].like.dtype, device=device)
        made.parts, made.cut, made._whole, made._shared = list(parts), cut, None, False
        return made

    def whole(self) -> torch.Tensor:
        """All patches, on every rank; every rank asks at the same point."""
        if self._whole is None:
            self._whole = self.cut.collect(self)
            self.parts = [Part.of(self.cut.take(self._whole, at)) for at in range(len(self.parts))]
        return self._whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in READERS:
            args, kwargs = pytree.tree_map(whole_of, (args, kwargs))
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
        if torch.Tag.inplace_view in func.tags or target is not None and target._shared:
            what = "has views" if target is not None and target._shared else "keeps its shape"
            raise RuntimeError(f"{func} changes a denoiser's result in place that {what}; write to a clone of it")
        back = _back(func, args, kwargs)
        if back is not None:
            return by_patch(func, args, kwargs, back)
        plain_args, plain_kwargs = pytree.tree_map(whole_of, (args, kwargs))
        found = func(*plain_args, **plain_kwargs)
        if target is not None:
            target.parts = [Part.of(target.cut.take(plain_args[0], at)) for at in range(len(target.parts))]
            return target
        return found


def whole_of(leaf: Any) -> Any:
    """All patches of a tensor in patches; anything else is itself."""
    return leaf.whole() if isinstance(leaf, PatchedTensor) else leaf


def by_patch(func: Any, args: tuple, kwargs: dict, back: int) -> Any:
    """Call an operator on each patch by itself; the result's cut dim is ``back`` from the end."""
    leaves = pytree.tree_leaves((args, kwargs))
    first = next(leaf for leaf in leaves if isinstance(leaf, PatchedTensor))
    inplace = isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable
    results = [_one(func, args, kwargs, first.cut, at, inplace) for at in range(len(first.parts))]
    if inplace:
        args[0].parts, args[0]._whole = [result[0][0] for result in results], None
        return args[0]
    cut = dataclasses.replace(first.cut, back=back)
    _, spec = results[0]
    made = [PatchedTensor([parts[at] for parts, _ in results], cut, first.device) for at in range(len(results[0][0]))]
    if isinstance(func, torch._ops.OpOverload) and func.is_view:
        for each in (first, *made):
            each._shared = True
    return pytree.tree_unflatten(made, spec)


def _one(func: Any, args: tuple, kwargs: dict, cut: Cut, at: int, inplace: bool) -> tuple[list[Part], Any]:
    """An operator's results for one patch: at once where all it needs is there, else as it arrives."""
    func = _functional(func) if inplace else func
    given = pytree.tree_map(lambda leaf: _of_patch(leaf, cut, at), (args, kwargs))
    parts = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Part)]
    if all(part.settled for part in parts):
        plain_args, plain_kwargs = pytree.tree_map(_value, given)
        flat, spec = pytree.tree_flatten(func(*plain_args, **plain_kwargs))
        return [Part.of(value) for value in flat], spec
    meta_args, meta_kwargs = pytree.tree_map(_like, given)
    flat, spec = pytree.tree_flatten(func(*meta_args, **meta_kwargs))
    if not all(part.here for part in parts):
        return [Part(_meta(like)) for like in flat], spec
    later = _Later(func, pytree.tree_map(_kept, given))
    return [Part(_meta(like), make=later.result(k)) for k, like in enumerate(flat)], spec


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


def _functional(func: Any) -> Callable[..., torch.Tensor]:
    """Returns what an operator in place writes, of the dtype and shape of what it writes to."""
    packet, overload = func._schema.name.split("::")[1].rstrip("_"), func._overloadname
    own = getattr(getattr(aten, packet), overload)

    def found(target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return own(target, *args, **kwargs).to(target.dtype).expand(target.shape)

    return found


def _of_patch(leaf: Any, cut: Cut, at: int) -> Any:
    """What one patch needs of an operand: the patch of it, or all where it has no position for each."""
    if isinstance(leaf, PatchedTensor):
        return leaf.parts[at]
    if isinstance(leaf, torch.Tensor) and leaf.ndim >= cut.back and leaf.shape[leaf.ndim - cut.back] == cut.size:
        return cut.take(leaf, at)
    return leaf


def _value(leaf: Any) -> Any:
    return leaf.value() if isinstance(leaf, Part) else leaf


def _like(leaf: Any) -> Any:
    if isinstance(leaf, Part):
        return leaf.like
    return _meta(leaf) if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf


def _kept(leaf: Any) -> Any:
    """An operand as it is now: others may change it in place before a patch arrives."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _meta(value: torch.Tensor) -> torch.Tensor:
    return value if value.is_meta else torch.empty(value.shape, dtype=value.dtype, device="meta")


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
