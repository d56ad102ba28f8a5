"""Convolutions over split rows: neighbours' rows are fetched, and only the true edges of the image are padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import fx

from .choices import choose_all, required, yielded
from .halo import Seen, fetch
from .local import Value, aten
from .rules import Typing

if TYPE_CHECKING:
    from .partition import FramePartitioner


def lower(part: FramePartitioner, node: fx.Node, typing: Typing, operands: list[Value]) -> list[Value] | None:
    """The convolution on this rank's shards, or None where nothing of it is split.

    Rows that it slides over bring their neighbours' rows; split channels are a partial sum, whose bias is added once;
    a depthwise convolution has as many groups as this rank has channels.
    """
    choices = choose_all(typing, operands, part.sharding.splits)
    if not choices:
        return None
    shape = typing.facts["convolution"]
    tensors = [
        part.coerce(value, typing.expected[at], required(choices, at), node, at) for at, value in enumerate(operands)
    ]
    tensors[0], seen = fetch(part, typing, tensors[0], choices)
    tensors[0], padding = _padded(part, typing, tensors[0], seen, shape["padding"])
    part.count(node, typing, choices)
    summed = frozenset(name for name, choice in choices.items() if choice.loop.kind == "sum")
    value = Value(tensors[0], typing.outs[0], node.meta["val"].dtype, yielded(choices, 0), summed)
    sizes = part.local.sizes(value)
    given = part.local.sizes(Value(tensors[0], typing.expected[0], value.dtype, required(choices, 0)))
    if 0 in sizes or any(size == 0 for dim, size in enumerate(given) if dim not in seen):
        value.node = part.local.call(aten.new_zeros.default, tensors[0], sizes)
    else:
        groups = sizes[1] if typing.facts.get("depthwise") else shape["groups"]
        value.node = _call(part, node, tensors[:2] if summed else tensors, padding, groups)
    if summed and len(tensors) > 2:
        value = part.summed(value)
        column = part.local.call(aten.reshape.default, tensors[2], [-1, *[1] * (len(sizes) - 2)])
        value.node = part.local.call(aten.add.Tensor, value.node, column)
    return [value]


def _padded(
    part: FramePartitioner, typing: Typing, inputs: fx.Node, seen: Mapping[int, Seen], padding: Sequence[int]
) -> tuple[fx.Node, list[int]]:
    """The input padded where this rank has a true edge of the image, and what padding is left to the operator."""
    rank, left = len(typing.expected[0]), list(padding)
    amounts = [0, 0] * rank
    for dim, rows in seen.items():
        left[dim - 2] = 0
        amounts[2 * (rank - 1 - dim) : 2 * (rank - dim)] = rows.missing
    if any(amounts):
        inputs = part.local.call(aten.constant_pad_nd.default, inputs, amounts, 0.0)
    return inputs, left


def _call(part: FramePartitioner, node: fx.Node, tensors: list[fx.Node], padding: list[int], groups: int) -> fx.Node:
    stride, dilation = (node.args[at] if len(node.args) > at else [1] for at in (3, 5))
    bias = tensors[2] if len(tensors) > 2 else None
    if "convolution" in str(node.target):
        tail = (node.args[6], node.args[7], groups)
        return part.local.call(node.target, *tensors[:2], bias, stride, padding, dilation, *tail)
    return part.local.call(node.target, *tensors[:2], bias, stride, padding, dilation, groups)
