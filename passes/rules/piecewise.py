"""Whether an operator can be computed piece by piece along one axis: its rule, which the partitioner goes by, is asked.

Patches of a denoiser's result go through schedulers so, and rows of an autoencoder in strips.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile.ir.arguments import overload_of
from xdit_compile.ir.axes import AxisSystem, resolve
from xdit_compile.passes.axes.rule import Rule, RuleBook, values

from .registry import rulebook


@dataclasses.dataclass(frozen=True)
class Operand:
    """What is known of a tensor among the arguments of an operator before it is computed.

    ``back`` is the dim that pieces lie along, from the end; None where that is not known, or the tensor has none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    back: int | None

    def like(self, size: int | None = None, dim: int | None = None) -> torch.Tensor:
        """A tensor of this form on the meta device, with another size along a dim."""
        shape = list(self.shape)
        if size is not None and dim is not None:
            shape[dim] = size
        return torch.empty(shape, dtype=self.dtype, device="meta")


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A call that can be made for each piece by itself.

    Args:
        operands: for every tensor among the arguments the dim that pieces lie along, from the end; None for one that
            each piece takes whole.
        results: the same for every tensor that the call yields.
        contracts: whether it sums products over a dim, so that what two pieces have in common is dear to compute twice.
    """

    operands: tuple[int | None, ...]
    results: tuple[int, ...]
    contracts: bool


@functools.lru_cache(maxsize=4096)
def piecewise(
    func: torch._ops.OpOverload, leaves: tuple[Any, ...], spec: pytree.TreeSpec, counts: tuple[int, ...]
) -> Piecewise | None:
    """How pieces go through an operator; None where they do not stay apart, or nobody knows.

    Args:
        leaves: the flat arguments, an `Operand` for each tensor.
        spec: their containers, a pair of positional and keyword arguments.
        counts: positions of each piece.
    """
    find = _book().find(func)
    if find is None:
        return None
    try:
        rule = Rule(*_typed(func, leaves, spec))
        find(rule)
    except Exception:
        return None
    return _followed(rule, [leaf for leaf in leaves if isinstance(leaf, Operand)], leaves, spec, counts)


@functools.cache
def _book() -> RuleBook:
    return rulebook()


def _typed(
    func: torch._ops.OpOverload, leaves: Sequence[Any], spec: pytree.TreeSpec
) -> tuple[fx.Node, list[list[Any]], AxisSystem]:
    """The call as a node of a graph, an axis of its own for every dim of every tensor it takes."""
    graph, system, axes = fx.Graph(), AxisSystem(), []
    flat = list(leaves)
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Operand):
            flat[position] = graph.placeholder(f"operand_{position}")
            flat[position].meta["val"] = leaf.like()
            axes.append([system.atom(size) for size in leaf.shape])
    args, kwargs = pytree.tree_unflatten(flat, spec)
    node = graph.call_function(func, tuple(args), kwargs)
    node.meta["val"] = _called(func, [leaf.like() if isinstance(leaf, Operand) else leaf for leaf in leaves], spec)
    return node, axes, system


def _called(func: torch._ops.OpOverload, flat: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    args, kwargs = pytree.tree_unflatten(list(flat), spec)
    return func(*args, **without_values(kwargs))


def without_values(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which an operator gives the form of its results: those that ask for a device get none there."""
    return {**kwargs, "device": torch.device("meta")} if kwargs.get("device") is not None else dict(kwargs)


def _followed(
    rule: Rule, operands: Sequence[Operand], leaves: Sequence[Any], spec: pytree.TreeSpec, counts: tuple[int, ...]
) -> Piecewise | None:
    """Where the axis of pieces goes, if every position of it is treated by itself."""
    cut = [(operand, len(each.shape) - each.back) for operand, each in enumerate(operands) if each.back is not None]
    axis = resolve(rule.actual[cut[0][0]][cut[0][1]])
    if any(resolve(rule.actual[operand][dim]) is not axis for operand, dim in cut):
        return None
    if any(loop.kind != "map" for loop in rule.loops if set(loop.args) & set(cut)):
        return None
    typed = rule.op_axes()
    along = [[dim for dim, each in enumerate(axes) if resolve(each) is axis] for axes in rule.actual]
    made = [[dim for dim, each in enumerate(axes) if resolve(each) is axis] for axes in typed.result_axes]
    if any((each.operand, each.dim) in cut for each in typed.boundaries) or any(len(dims) > 1 for dims in along):
        return None
    if any(len(dims) != 1 for dims in made) or not _fits(rule, along, made, leaves, spec, counts):
        return None
    backs = (len(each.shape) - dims[0] if dims else None for each, dims in zip(operands, along, strict=True))
    results = (each.dim() - dims[0] for each, dims in zip(values(rule.node), made, strict=True))
    return Piecewise(
        tuple(backs), tuple(results), any(loop.kind == "sum" and len(loop.args) > 1 for loop in rule.loops)
    )


def _fits(
    rule: Rule,
    along: Sequence[Sequence[int]],
    made: Sequence[Sequence[int]],
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    counts: tuple[int, ...],
) -> bool:
    """Whether the same call gives the right shapes for each piece: arguments may name the size of the whole."""
    whole, target = values(rule.node), overload_of(rule.node)
    for count in set(counts):
        dims = iter([next(iter(each), None) for each in along])
        flat = [leaf.like(count, next(dims)) if isinstance(leaf, Operand) else leaf for leaf in leaves]
        try:
            tensors = pytree.tree_leaves(_called(target, flat, spec))
        except Exception:
            return False
        for tensor, each, (dim,) in zip(tensors, whole, made, strict=True):
            if list(tensor.shape) != [*each.shape[:dim], count, *each.shape[dim + 1 :]]:
                return False
    return True
