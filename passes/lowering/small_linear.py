"""Linears of few rows (time steps, modulations): each rank computes some columns, and all gather the small result.

Their weights are a good part of some denoisers, while their results are so small that gathering them costs nothing.
Ranks of `tensor` hold these columns of the weights alone, each of every linear. Ranks that share the tokens hold all
weights, and would each read all of them for one row: of linears of one value they take columns end to end instead, some
linears each, and gather all results at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import fx

from xdit_compile.ir.arguments import node_of
from xdit_compile.ir.sharding import share
from xdit_compile.passes.axes.flops import flops, portion
from xdit_compile.passes.axes.rule import OpAxes, operator_name
from xdit_compile.passes.local.choose_loop import ShardedLoop, choose_all, required, yielded
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.local_graph import Value, aten
from xdit_compile.plan.methods import SEQUENCE, TENSOR

SMALL = 1 / 16
"""A result of at most this share of its weight's elements is small."""
WORTH_A_GATHER = 2**26
"""Bytes of weights that a rank need not read: about what the memory of a card gives in the 20 us of a small gather."""


def has_few_rows(node: fx.Node) -> bool:
    """Whether a node is a linear whose result is small beside its weight, and not empty."""
    if not isinstance(node.target, torch._ops.OpOverload) or operator_name(node.target) != "linear":
        return False
    weight = node_of(node.args[1]).meta["val"]
    return bool(0 < node.meta["val"].numel() <= SMALL * weight.numel())


def lower(context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
    """The linear by columns, or None where ranks have no part in it or split it in another way.

    Returns:
        The result [..., out], of which every rank has all columns.
    """
    if node in context.ahead:
        return [context.ahead[node]]
    choices = choose_all(op_axes, operands, context.sharding.splits)
    if not has_few_rows(node):
        return None
    if TENSOR in context.sharding.splits:
        return None if TENSOR in choices else _by_columns(context, node, op_axes, operands, choices)
    shared = SEQUENCE in context.sharding.splits and SEQUENCE not in choices and context.layout.shares_columns
    return _end_to_end(context, node) if shared else None


def _by_columns(
    context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value], choices: Mapping[str, ShardedLoop]
) -> list[Value]:
    """Some columns of a linear on each rank of `tensor`."""
    tensors = _laid_out(context, node, operands, choices)
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


def _laid_out(
    context: LoweringContext, node: fx.Node, operands: list[Value], choices: Mapping[str, ShardedLoop]
) -> list[fx.Node]:
    """The operands of a linear as its loops want them."""
    axes = context.frame.op_axes[node].operand_axes
    return [
        context.redistribute(value, axes[operand], required(choices, operand), node, operand)
        for operand, value in enumerate(operands)
    ]


def _end_to_end(context: LoweringContext, node: fx.Node) -> list[Value] | None:
    """All linears of the value that one reads, as a single one of all their columns, of which each rank has its share.

    Returns:
        The result of this one; those of the others are kept for when their turn comes. None where it is not worth it.
    """
    linears = [
        each
        for each in node.graph.find_nodes(op="call_function", target=node.target)
        if _goes_with(context, node, each)
    ]
    parts, index, local = context.parts(SEQUENCE), context.sharding.index[SEQUENCE], context.local
    begins = list(itertools.accumulate((len(_weight(each)) for each in linears), initial=0))
    spared = sum(_weight(each).nbytes for each in linears) * (parts - 1) // parts
    if node not in linears or spared < WORTH_A_GATHER or begins[-1] < parts:
        return None
    values = [_result(context, each) for each in linears]
    bounds = [share(begins[-1], parts, rank) for rank in range(parts)]
    shares = [
        (max(bounds[index][0], begin) - begin, min(bounds[index][1], end) - begin)
        for begin, end in itertools.pairwise(begins)
    ]
    made = [_some_columns(context, each, *run) for each, run in zip(linears, shares, strict=True) if run[0] < run[1]]
    rows = local.sizes(values[0])[:-1]
    partial = local.call(aten.cat.default, made, -1) if len(made) > 1 else made[0]
    sizes = [stop - start for start, stop in bounds]
    gather = torch.ops.xdit_compile.all_gather.default
    wide = local.call(gather, partial, len(rows), sizes, context.layout.groups[SEQUENCE])
    context.ledger.sent("all_gather", "columns", math.prod(rows) * sizes[index] * (parts - 1), values[0].dtype)
    for each, value, (start, stop), begin, end in zip(linears, values, shares, begins, begins[1:], strict=False):
        context.ledger.work(flops(each), max(stop - start, 0) / (end - begin), (SEQUENCE, *value.split))
        context.ahead[each] = dataclasses.replace(value, node=local.call(aten.slice.Tensor, wide, -1, begin, end))
    return [context.ahead[node]]


def _weight(linear: fx.Node) -> torch.Tensor:
    weight = node_of(linear.args[1]).meta["val"]
    assert isinstance(weight, torch.Tensor)
    return weight


def _operands(context: LoweringContext, node: fx.Node) -> list[Value]:
    return [context.latest(context.env[operand][0]) for operand in context.frame.op_axes[node].operands]


def _goes_with(context: LoweringContext, node: fx.Node, other: fx.Node) -> bool:
    """Whether a linear reads the value of another one, and can be computed now and lie as that one does."""
    dtypes = {each.meta["val"].dtype for each in (node, other)}
    if other.args[0] is not node.args[0] or not has_few_rows(other) or len(dtypes) > 1:
        return False
    if not all(operand in context.env for operand in context.frame.op_axes[other].operands):
        return False
    value, (_, *parameters) = _result(context, other), _operands(context, other)
    lies_alike = SEQUENCE not in value.split and value.split == _result(context, node).split
    return lies_alike and all(each.replicated for each in parameters)


def _result(context: LoweringContext, node: fx.Node) -> Value:
    """How the result of a linear lies, before anything computes it."""
    op_axes, operands = context.frame.op_axes[node], _operands(context, node)
    split = yielded(choose_all(op_axes, operands, context.sharding.splits), 0)
    return Value(operands[0].node, op_axes.result_axes[0], node.meta["val"].dtype, split)


def _some_columns(context: LoweringContext, node: fx.Node, start: int, stop: int) -> fx.Node:
    """Columns ``start`` to ``stop`` of a linear."""
    operands, columns = _operands(context, node), len(_weight(node))
    choices = choose_all(context.frame.op_axes[node], operands, context.sharding.splits)
    tensors = _laid_out(context, node, operands, choices)
    weights = [context.local.take(tensor, 0, np.arange(start, stop), columns) for tensor in tensors[1:]]
    return context.local.call(aten.linear.default, tensors[0], *weights)
