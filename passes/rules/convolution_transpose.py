"""The rule of transposed convolutions: every row of the operand is spread over a window of rows of the result."""

from __future__ import annotations

import numpy as np
from torch import fx

from xdit_compile.passes.axes.local_call import LocalCall
from xdit_compile.passes.axes.rule import Rule, RuleBook, type_opaquely
from xdit_compile.passes.axes.windows import Windows

from .convolution import per_dim

BOOK = RuleBook()


@BOOK.rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(rule: Rule) -> None:
    """A map over batch, windows over space; channels are needed whole.

    A rank computes the rows that its rows of the operand are spread over, and cuts out its own.
    """
    rank = len(rule.actual[1]) - 2
    if len(rule.actual[0]) != rank + 2:
        type_opaquely(rule, "a convolution without a batch dim")
        return
    names = ("stride", "padding", "output_padding", "dilation")
    arguments = (rule.named(name, int(name in ("stride", "dilation"))) for name in names)
    stride, padding, extra, dilation = (per_dim(value, rank) for value in arguments)
    reach = [dilation[k] * (size - 1) + 1 for k, size in enumerate(rule.shape(1)[2:])]
    rule.loop("map", [(0, 0)], [(0, 0)])
    for operand, dim in ((0, 1), (1, 0), (1, 1)):
        rule.opaque(operand, dim, "channels of a transposed convolution")
    for k in range(rank):
        rule.look(k + 2, _windows(rule, k + 2, reach[k], stride[k], padding[k]))

    def emit(ctx: LocalCall) -> fx.Node:
        left, more = list(padding), list(extra)
        for dim, seen in ctx.seen.items():
            made = (seen.stop - seen.start - 1) * stride[dim - 2] + reach[dim - 2]
            first = seen.first + padding[dim - 2] - seen.start * stride[dim - 2]
            left[dim - 2], more[dim - 2] = 0, max(first + seen.last - seen.first - made, 0)
        bias = ctx.operand(2) if len(rule.operands) > 2 else None
        groups = rule.named("groups", 1)
        node = ctx.call(ctx.node.target, ctx.operand(0), ctx.operand(1), bias, stride, left, more, groups, dilation)
        for dim, seen in ctx.seen.items():
            first = seen.first + padding[dim - 2] - seen.start * stride[dim - 2]
            node = ctx.call(ctx.aten.slice.Tensor, node, dim, first, first + seen.last - seen.first)
        return node

    rule.emit = emit


def _windows(rule: Rule, dim: int, reach: int, stride: int, padding: int) -> Windows:
    """Row ``o`` of the result is made of rows ``i`` with ``0 <= o + padding - i * stride < reach``."""
    size = rule.shape(0)[dim]
    places = np.arange(rule.out_shape()[dim]) + padding
    last = np.minimum(places // stride, size - 1)
    first = np.minimum(-((reach - 1 - places) // stride), last)
    return Windows(first, last, np.minimum((places - (reach - 1) / 2) / stride, size - 1), size)
