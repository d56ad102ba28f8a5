"""Linears of few rows (time steps, modulations): each rank computes some columns, and all gather the small result.

Their weights are a good part of some denoisers, while their results are so small that gathering them costs nothing.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import fx

from xdit_compile.ir.arguments import node_of
from xdit_compile.ir.sharding import share
from xdit_compile.passes.axes.flops import flops, portion
from xdit_compile.passes.axes.rule import OpAxes, operator_name
from xdit_compile.passes.local.choose_loop import choose_all, required, yielded
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.local_graph import Value, aten
from xdit_compile.plan.methods import TENSOR

SMALL = 1 / 16
"""A result of at most this share of its weight's elements is small."""


def has_few_rows(node: fx.Node) -> bool:
    """Whether a node is a linear whose result is small beside its weight, and not empty."""
    if not isinstance(node.target, torch._ops.OpOverload) or operator_name(node.target) != "linear":
        return False
    weight = node_of(node.args[1]).meta["val"]
    return bool(0 < node.meta["val"].numel() <= SMALL * weight.numel())


def lower(context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
    """The linear by columns, or None where the tensor ranks have no part in it or split it in another way.

    Returns:
        The result [..., out], of which every tensor rank has all columns.
    """
    choices = choose_all(op_axes, operands, context.sharding.splits)
    if TENSOR not in context.sharding.splits or TENSOR in choices or not has_few_rows(node):
        return None
    tensors = [
        context.redistribute(value, op_axes.operand_axes[operand], required(choices, operand), node, operand)
        for operand, value in enumerate(operands)
    ]
    local, parts, columns = context.local, context.parts(TENSOR), op_axes.result_axes[0][-1].size
    bounds = [share(columns, parts, index) for index in range(parts)]
    mine = np.arange(*bounds[context.sharding.index[TENSOR]])
    weights = [local.cut(tensor, 0, mine, columns, TENSOR) for tensor in tensors[1:]]
    value = Value(tensors[0], op_axes.result_axes[0], node.meta["val"].dtype, yielded(choices, 0))
    rows = local.sizes(value)[:-1]
    if len(mine) and 0 not in rows:
        partial = local.call(aten.linear.default, tensors[0], *weights)
    else:
        partial = local.call(aten.new_zeros.default, tensors[0], [*rows, len(mine)])
    sizes = [stop - start for start, stop in bounds]
    gather = torch.ops.xdit_compile.all_gather.default
    made = local.call(gather, partial, len(rows), sizes, context.layout.groups[TENSOR])
    context.ledger.sent("all_gather", "columns", math.prod(rows) * len(mine) * (parts - 1), value.dtype)
    total = math.prod(axis.size for axis in op_axes.result_axes[0])
    context.ledger.work(flops(node), portion(len(mine) * math.prod(rows), total), (TENSOR, *choices))
    return [dataclasses.replace(value, node=made)]
