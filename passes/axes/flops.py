"""Floating-point operations of the operators that dominate a denoiser, from their shapes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from .rule import operator_name, tensor_operands

Shape = list[int]


def flops(node: fx.Node) -> int:
    """Multiplications and additions of one call on unsplit tensors; 0 for operators that only move or map values."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    count = _COUNTS.get(operator_name(node.target))
    if count is None:
        return 0
    shapes = [list(operand.meta["val"].shape) for operand in tensor_operands(node)]
    return count(node, shapes, list(node.meta["val"].shape))


def _contraction(operand: int, dim: int) -> Callable[[fx.Node, list[Shape], Shape], int]:
    return lambda node, shapes, out: 2 * math.prod(out) * shapes[operand][dim]


def _convolution(node: fx.Node, shapes: list[Shape], out: Shape) -> int:
    return 2 * math.prod(out) * math.prod(shapes[1][1:])


def _transposed(node: fx.Node, shapes: list[Shape], out: Shape) -> int:
    return 2 * math.prod(shapes[0]) * math.prod(shapes[1][1:])


def _einsum(node: fx.Node, shapes: list[Shape], out: Shape) -> int:
    equation = str(node.args[0]).replace(" ", "").replace("...", "")
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.split("->")[0].split(","), shapes, strict=True):
        sizes.update(zip(reversed(term), reversed(shape), strict=False))
    batch = max(
        math.prod(shape[: len(shape) - len(term)])
        for term, shape in zip(equation.split("->")[0].split(","), shapes, strict=True)
    )
    return (2 if len(shapes) > 1 else 0) * math.prod(sizes.values()) * batch


def _attention(node: fx.Node, shapes: list[Shape], out: Shape) -> int:
    queries, keys = shapes[0], shapes[1]
    return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + out[-1])


_COUNTS: dict[str, Callable[[fx.Node, list[Shape], Shape], int]] = {
    "linear": _contraction(0, -1),
    "mm": _contraction(0, -1),
    "bmm": _contraction(0, -1),
    "matmul": _contraction(0, -1),
    "addmm": _contraction(1, -1),
    "baddbmm": _contraction(1, -1),
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
}


def portion(here: float, whole: float) -> float:
    """The share, from 0 to 1, that one rank has of a whole: ``here`` of it; none of nothing."""
    return here / whole if whole else 0.0
