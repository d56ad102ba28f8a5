"""Norms over a split dim: partial statistics joined by one small all-reduce, or whole groups by themselves."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import fx

from xdit_compile.axes import Atom, Axis, same
from xdit_compile.shards import Split

from .choices import choose_all
from .local import Value, aten
from .rules import Typing, operator_name

if TYPE_CHECKING:
    from .partition import FramePartitioner

ROOT_MEAN_SQUARE = ("rms_norm", "_fused_rms_norm")


def lower(part: FramePartitioner, node: fx.Node, typing: Typing, operands: list[Value]) -> list[Value] | None:
    """The norm on this rank's positions, or None where no normalised dim is split or another way is needed."""
    name = operator_name(node.target)  # type: ignore[arg-type]
    if name == "group_norm":
        return _whole_groups(part, node, typing, operands)
    return _root_mean_square(part, node, typing, operands) if name in ROOT_MEAN_SQUARE else None


def _whole_groups(part: FramePartitioner, node: fx.Node, typing: Typing, operands: list[Value]) -> list[Value] | None:
    """A group norm of which this rank holds whole groups, over all of their positions."""
    given, axes = part.summed(operands[0]), typing.expected[0]
    size = axes[1].size // node.args[1]  # type: ignore[operator]
    over = [name for name, dim in given.split.items() if dim == 1 and same(given.axes[1], axes[1])]
    if not over or any(not _are_whole(part.sharding.splits[name], axes[1], size) for name in over):
        return None
    choices = choose_all(typing, operands, {n: s for n, s in part.sharding.splits.items() if n not in over})
    split = {name: choice.results[0] for name, choice in choices.items() if 0 in choice.results}
    split |= dict.fromkeys(over, 1)
    tensors = [part.coerce(given, axes, split, node, 0)]
    for at, value in enumerate(operands[1:], 1):
        tensors.append(part.coerce(value, typing.expected[at], dict.fromkeys(over, 0), node, at))
    value = Value(tensors[0], typing.outs[0], given.dtype, split)
    sizes = part.local.sizes(value)
    if 0 in sizes:
        value.node = part.local.call(aten.new_zeros.default, tensors[0], sizes)
    else:
        affine = [tensors[1] if len(tensors) > 1 else None, tensors[2] if len(tensors) > 2 else None]
        epsilon = node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5)
        value.node = part.local.call(node.target, tensors[0], sizes[1] // size, *affine, epsilon)
    return [value]


def _are_whole(split: Split, axis: Axis, size: int) -> bool:
    """Whether every rank holds whole groups of ``size`` neighbours, in order."""
    held = [split.positions(axis, index) for index in range(split.parts)]
    return all(
        len(positions) % size == 0
        and np.array_equal(
            positions, np.repeat(positions[::size], size) + np.tile(np.arange(size), len(positions) // size)
        )
        and not (positions[::size] % size).any()
        for positions in held
    )


def _root_mean_square(
    part: FramePartitioner, node: fx.Node, typing: Typing, operands: list[Value]
) -> list[Value] | None:
    """Statistics are float32, or float64 where the input is, as PyTorch's own kernels have them."""
    given, axes = part.summed(operands[0]), typing.expected[0]
    first = len(axes) - len(node.args[1])  # type: ignore[arg-type]
    over = {
        name: dim for name, dim in given.split.items() if dim >= first and same(given.axes[dim], axes[dim])
    }  # fmt: skip
    if not over:
        return None
    choices = choose_all(typing, operands, {n: s for n, s in part.sharding.splits.items() if n not in over})
    outer = {name: choice.results[0] for name, choice in choices.items() if 0 in choice.results}
    split = {**outer, **over}
    local, dtype = part.local, given.dtype
    wide = torch.promote_types(dtype, torch.float32)
    inputs = _cast(part, part.coerce(given, axes, split, node, 0), dtype, wide)
    dims = list(range(first, len(axes)))
    squares = local.call(aten.sum.dim_IntList, local.call(aten.mul.Tensor, inputs, inputs), dims, True)
    total = part.summed(
        Value(squares, [*axes[:first], *(Atom(1, 0) for _ in dims)], wide, outer, frozenset(over)), "norm statistics"
    )
    mean = local.call(aten.div.Scalar, total.node, math.prod(axis.size for axis in axes[first:]))
    epsilon = _epsilon(node, dtype)
    scale = local.call(aten.rsqrt.default, local.call(aten.add.Scalar, mean, epsilon))
    result = local.call(aten.mul.Tensor, inputs, scale)
    if len(operands) > 1:
        required = {name: dim - first for name, dim in over.items()}
        weight = part.coerce(operands[1], typing.expected[1], required, node, 1)
        result = local.call(aten.mul.Tensor, result, _cast(part, weight, operands[1].dtype, wide))
    value = Value(_cast(part, result, wide, dtype), typing.outs[0], dtype, split)
    if len(typing.outs) == 1:
        return [value]
    return [value, dataclasses.replace(total, node=scale, axes=typing.outs[1])]


def _epsilon(node: fx.Node, dtype: torch.dtype) -> float:
    given = node.args[3] if len(node.args) > 3 else node.kwargs.get("eps")
    return torch.finfo(dtype).eps if given is None else float(given)  # type: ignore[arg-type]


def _cast(part: FramePartitioner, value: fx.Node, dtype: torch.dtype, wanted: torch.dtype) -> fx.Node:
    return value if dtype == wanted else part.local.call(aten._to_copy.default, value, dtype=wanted)
