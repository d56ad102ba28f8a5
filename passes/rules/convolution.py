"""Rules of operators that look at neighbours: convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xdit_compile.ir.arguments import overload_of
from xdit_compile.ir.axes import Axis, Conflict
from xdit_compile.passes.axes.operators import CONVOLUTIONS, ConvolutionOp
from xdit_compile.passes.axes.rule import Rule, RuleBook, type_opaquely
from xdit_compile.passes.axes.windows import Windows

BOOK = RuleBook()


def per_dim(value: Any, rank: int) -> list[int]:
    """One number for each of ``rank`` dims, where an argument may give one for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


@BOOK.rule(*CONVOLUTIONS)
def convolution(rule: Rule) -> None:
    """A map over batch and channels of the result, a sum over those of the operand, windows over space.

    Of a depthwise one channels are one map; those of another grouped one are needed whole.
    """
    rank = len(rule.actual[1]) - 2
    if len(rule.actual[0]) != len(rule.actual[1]):
        type_opaquely(rule, "a convolution without a batch dim")
        return
    general = "convolution" in str(rule.node.target)
    kernel = rule.shape(1)[2:]
    stride, dilation = per_dim(rule.arg(3, "stride", 1), rank), per_dim(rule.arg(5, "dilation", 1), rank)
    padding = _padding(rule, kernel, dilation)
    if padding is None or (general and rule.arg(6, "transposed")):
        _opaque_space(rule, range(rank), "uneven padding by name or a transposed convolution")
        _channels(rule, 0)
        return
    groups = rule.arg(8, "groups", 1) if general else rule.arg(6, "groups", 1)
    _channels(rule, groups)
    for k in range(rank):
        _space(rule, k + 2, kernel[k], stride[k], padding[k], dilation[k])
    depthwise = groups > 1 and groups == rule.shape(0)[1] == rule.shape(1)[0]
    rule.operator = ConvolutionOp(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups, depthwise)


def _padding(rule: Rule, kernel: Sequence[int], dilation: Sequence[int]) -> list[int] | None:
    """The rows of padding before and after each dim; None where a name asks for more after than before."""
    named = "padding" in overload_of(rule.node)._overloadname
    padding = rule.arg(4, "padding", "valid" if named else 0)
    if padding == "valid":
        return [0] * len(kernel)
    if padding == "same":
        reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        return None if any(rows % 2 for rows in reach) else [rows // 2 for rows in reach]
    return per_dim(padding, len(kernel))


def _channels(rule: Rule, groups: int) -> None:
    bias = [(2, 0)] if len(rule.operands) > 2 else []
    rule.bias = 2 if bias else None
    rule.loop("map", [(0, 0)], [(0, 0)])
    if groups == 1:
        rule.loop("sum", [(0, 1), (1, 1)], [])
        rule.loop("map", [(1, 0), *bias], [(0, 1)])
    elif groups == rule.shape(0)[1] == rule.shape(1)[0]:
        rule.loop("map", [(0, 1), (1, 0), *bias], [(0, 1)])
    else:
        rule.opaque(0, 1, "grouped channels")
        rule.opaque(1, 0, "grouped channels")


def _space(rule: Rule, dim: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    size, out = rule.shape(0)[dim], rule.out_shape()[dim]
    reach = dilation * (kernel - 1) + 1
    if reach == stride == 1 and padding == 0:
        rule.loop("map", [(0, dim)], [(0, dim)])
    elif stride == reach and dilation == 1 and padding == 0 and size % kernel == 0:
        patches(rule, dim, kernel)
    else:
        rule.look(dim, Windows.sliding(size, out, reach, stride, padding), _strided(rule, dim, stride))


def _strided(rule: Rule, dim: int, stride: int) -> Axis | None:
    """The axis of every ``stride``-th row, where the result has just these; its own where there is no stride."""
    size, out = rule.shape(0)[dim], rule.out_shape()[dim]
    if size != out * stride:
        return None
    try:
        return rule.system.split(rule.actual[0][dim], stride)[0]
    except Conflict:
        return None


def patches(rule: Rule, dim: int, kernel: int) -> None:
    """Record that every run of ``kernel`` positions of a dim of the first operand makes one of that dim of the result.

    The result has the outer factor of the axis; one that cannot be split so is needed whole.
    """
    try:
        outer, _ = rule.system.split(rule.actual[0][dim], kernel)
    except Conflict as conflict:
        rule.opaque(0, dim, str(conflict))
        return
    rule.result_axes[0][dim] = outer
    rule.add_join([(0, dim)], [(0, dim)])


def _opaque_space(rule: Rule, dims: Sequence[int], reason: str) -> None:
    for k in dims:
        rule.opaque(0, k + 2, reason)


@BOOK.rule("avg_pool2d", "avg_pool1d", "avg_pool3d", "max_pool2d")
def pool(rule: Rule) -> None:
    """A map over batch and channels, windows over space; a dim that is padded is needed whole."""
    rank = len(rule.actual[0])
    space = {1: 1, 2: 2, 3: 3}[int(str(rule.node.target).split("d.")[0][-1])]
    kernel = per_dim(rule.arg(1, "kernel_size"), space)
    stride = per_dim(rule.arg(2, "stride", kernel) or kernel, space)
    padding = per_dim(rule.arg(3, "padding", 0), space)
    for dim in range(rank - space):
        rule.loop("map", [(0, dim)], [(0, dim)])
    if "max" in str(rule.node.target) and per_dim(rule.arg(4, "dilation", 1), space) != [1] * space:
        _opaque_space(rule, range(space), "a dilated pool")
        return
    for k in range(space):
        dim = rank - space + k
        size, out = rule.shape(0)[dim], rule.out_shape()[dim]
        if kernel[k] == stride[k] and not padding[k] and out * kernel[k] == size:
            patches(rule, dim, kernel[k])
        elif not padding[k] and (out - 1) * stride[k] + kernel[k] <= size:
            rule.look(dim, Windows.sliding(size, out, kernel[k], stride[k], 0), _strided(rule, dim, stride[k]))
        else:
            rule.opaque(0, dim, "a pool with padding")
