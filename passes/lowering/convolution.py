"""Convolutions over split rows: neighbours' rows are fetched, and only the true edges of the image are padded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx

import xdit_compile.kernels.put_rows  # noqa: F401  (registers the op that the graph calls)
from xdit_compile.ir.arguments import overload_of
from xdit_compile.passes.axes.operators import ConvolutionOp
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.axes.windows import HaloWindow
from xdit_compile.passes.local.choose_loop import ShardedLoop, choose_all, required, yielded
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.halo import ask, fetch
from xdit_compile.passes.local.local_graph import Value, aten
from xdit_compile.plan.methods import PATCH


def lower(context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
    """The convolution on this rank's shards, or None where nothing of it is split.

    Rows that it slides over bring their neighbours' rows; split channels are a partial sum, whose bias is added once;
    a depthwise convolution has as many groups as this rank has channels.
    """
    choices = choose_all(op_axes, operands, context.sharding.splits)
    if not choices:
        return None
    convolution = op_axes.operator
    assert isinstance(convolution, ConvolutionOp)
    tensors = [
        context.redistribute(value, op_axes.operand_axes[operand], required(choices, operand), node, operand)
        for operand, value in enumerate(operands)
    ]
    overlapped = _overlapped(context, node, op_axes, convolution, tensors, choices)
    if overlapped is not None:
        return [overlapped]
    tensors[0], seen = fetch(context, op_axes, tensors[0], choices)
    tensors[0], padding = _padded(context, op_axes, tensors[0], seen, convolution.padding)
    context.count(node, op_axes, choices)
    summed = frozenset(name for name, choice in choices.items() if choice.loop.kind == "sum")
    value = Value(tensors[0], op_axes.result_axes[0], node.meta["val"].dtype, yielded(choices, 0), summed)
    sizes = context.local.sizes(value)
    held = context.local.sizes(Value(tensors[0], op_axes.operand_axes[0], value.dtype, required(choices, 0)))
    if 0 in sizes or any(size == 0 for dim, size in enumerate(held) if dim not in seen):
        made = context.local.call(aten.new_zeros.default, tensors[0], sizes)
    else:
        groups = sizes[1] if convolution.depthwise else convolution.groups
        made = _call(context, node, tensors[:2] if summed else tensors, padding, groups)
    value = dataclasses.replace(value, node=made)
    if summed and len(tensors) > 2:
        value = context.summed(value)
        column = context.local.call(aten.reshape.default, tensors[2], [-1, *[1] * (len(sizes) - 2)])
        value = dataclasses.replace(value, node=context.local.call(aten.add.Tensor, value.node, column))
    return [value]


def _overlapped(
    context: LoweringContext,
    node: fx.Node,
    op_axes: OpAxes,
    convolution: ConvolutionOp,
    tensors: list[fx.Node],
    choices: Mapping[str, ShardedLoop],
) -> Value | None:
    """A convolution of the rows that are here while those of other ranks are on their way; None where it has to wait.

    The rows next to other ranks come out wrong at first, as if zeros followed, and are put right when theirs are there.
    Nothing is copied but a few rows.
    """
    halos = [name for name, choice in choices.items() if choice.loop.kind == "halo"]
    summed = any(choice.loop.kind == "sum" for choice in choices.values())
    if context.layout.sparing or len(halos) != 1 or halos[0] == PATCH or summed or convolution.depthwise:
        return None
    dim = choices[halos[0]].operands[0]
    reach, edge = convolution.reach(dim), convolution.padding[dim - 2]
    value = Value(tensors[0], op_axes.result_axes[0], node.meta["val"].dtype, yielded(choices, 0))
    sizes = context.local.sizes(value)
    held = context.sharding.sizes(op_axes.operand_axes[0], required(choices, 0))
    if convolution.stride[dim - 2] != 1 or 2 * edge != reach - 1 or not edge or 0 in sizes or 0 in held:
        return None
    if held[dim] != sizes[dim] or held[dim] < 2 * edge or not _same_ends(context, op_axes, halos[0], choices):
        return None
    request = ask(context, op_axes, halos[0], choices, hidden=True)
    context.count(node, op_axes, choices)
    call, halo = context.local.call, torch.ops.xdit_compile
    incoming = call(halo.halo_start.default, tensors[0], *request.rows.arguments)
    made = _call(context, node, tensors, list(convolution.padding), convolution.groups)
    left = [0 if k == dim - 2 else amount for k, amount in enumerate(convolution.padding)]
    (start, stop), rows, taken = request.rows.own, held[dim], 0
    for above in (True, False):
        count = start - request.seen.start if above else request.seen.stop - stop
        if count:
            near = (0, 2 * edge) if above else (rows - 2 * edge, rows)
            here = call(aten.slice.Tensor, tensors[0], dim, *near)
            place = (dim, taken, count, above, edge - count)
            inputs = call(halo.halo_finish.default, incoming, here, *place, request.rows.group)
            taken += count * math.prod(held[:dim] + held[dim + 1 :])
            right = _call(context, node, [inputs, *tensors[1:]], left, convolution.groups)
            call(halo.put_rows.default, made, right, dim, 0 if above else rows - edge)
    return dataclasses.replace(value, node=made)


def _same_ends(context: LoweringContext, op_axes: OpAxes, name: str, choices: Mapping[str, ShardedLoop]) -> bool:
    split, choice = context.sharding.splits[name], choices[name]
    read, made = op_axes.operand_axes[0][choice.operands[0]], op_axes.result_axes[0][choice.results[0]]
    return split.ends(read) == split.ends(made)


def _padded(
    context: LoweringContext, op_axes: OpAxes, inputs: fx.Node, seen: Mapping[int, HaloWindow], padding: Sequence[int]
) -> tuple[fx.Node, list[int]]:
    """The input padded where this rank has a true edge of the image, and what padding is left to the operator."""
    rank, left = len(op_axes.operand_axes[0]), list(padding)
    amounts = [0, 0] * rank
    for dim, rows in seen.items():
        left[dim - 2] = 0
        amounts[2 * (rank - 1 - dim) : 2 * (rank - dim)] = rows.missing
    if any(amounts):
        inputs = context.local.call(aten.constant_pad_nd.default, inputs, amounts, 0.0)
    return inputs, left


def _call(context: LoweringContext, node: fx.Node, tensors: list[fx.Node], padding: list[int], groups: int) -> fx.Node:
    stride, dilation = (node.args[position] if len(node.args) > position else [1] for position in (3, 5))
    bias = tensors[2] if len(tensors) > 2 else None
    if "convolution" in str(node.target):
        tail = (node.args[6], node.args[7], groups)
        return context.local.call(node.target, *tensors[:2], bias, stride, padding, dilation, *tail)
    target = overload_of(node).overloadpacket.default
    return context.local.call(target, *tensors[:2], bias, stride, padding, dilation, groups)
