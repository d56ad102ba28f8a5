"""Convolutions over split rows: neighbours' rows are fetched, and only the true edges of the image are padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .choices import Choice, choose
from .local import Value, aten
from .rules import Typing

if TYPE_CHECKING:
    from .partition import FramePartitioner


def lower(part: FramePartitioner, node: fx.Node, typing: Typing, operands: list[Value]) -> list[Value] | None:
    """The convolution with halos, where the input is split along a dim that it slides over."""
    choices: dict[str, Choice] = {}
    for name, split in part.sharding.splits.items():
        chosen = choose(typing, operands, split)
        if chosen is not None:
            choices[name] = chosen
    halos = {name: choice for name, choice in choices.items() if choice.loop.kind == "halo"}
    if not halos:
        return None
    shape = typing.facts["convolution"]
    inputs = part.coerce(
        operands[0], typing.expected[0], {n: c.operands[0] for n, c in choices.items() if 0 in c.operands}, node, 0
    )
    padding = list(shape["padding"])
    for name, choice in halos.items():
        inputs = _with_halo(part, typing, inputs, name, choice.operands[0], shape, padding)
    others = [
        part.coerce(
            value, typing.expected[at], {n: c.operands[at] for n, c in choices.items() if at in c.operands}, node, at
        )
        for at, value in enumerate(operands)
        if at > 0
    ]
    part.count(node, typing, choices)
    outs = {name: choice.results[0] for name, choice in choices.items()}
    value = Value(inputs, typing.outs[0], node.meta["val"].dtype, outs)
    sizes = part.local.sizes(value)
    if 0 in sizes:
        value.node = part.local.call(aten.new_zeros.default, inputs, sizes)
    else:
        value.node = _call(part, node, [inputs, *others], padding)
    return [value]


def _with_halo(
    part: FramePartitioner,
    typing: Typing,
    inputs: fx.Node,
    name: str,
    dim: int,
    shape: dict[str, Any],
    padding: list[int],
) -> fx.Node:
    k = dim - 2
    before = shape["padding"][k]
    after = (shape["kernel"][k] - 1) * shape["dilation"][k] - before
    axis, split = typing.expected[0][dim], part.sharding.splits[name]
    sizes = [split.length(axis, index) for index in range(split.parts)]
    here = part.sharding.index[name]
    above, below = sum(sizes[:here]), sum(sizes[here + 1 :])
    inputs = part.local.call(
        torch.ops.xdit_compile.halo_exchange.default, inputs, dim, before, after, sizes, here, part.local.groups[name]
    )
    numel = 1
    for other, size in enumerate(typing.expected[0]):
        numel *= size.size if other != dim else 1
    sent = (before if below else 0) + (after if above else 0)
    part.ledger.sent("halo_exchange", "halo", min(sent, 2 * sizes[here]) * numel, typing.operands[0].meta["val"].dtype)
    padding[k] = 0
    missing = [max(0, before - above), max(0, after - below)]
    if any(missing):
        amounts = [0, 0] * (len(typing.expected[0]) - 1 - dim) + missing
        inputs = part.local.call(aten.constant_pad_nd.default, inputs, amounts, 0.0)
    return inputs


def _call(part: FramePartitioner, node: fx.Node, tensors: list[fx.Node], padding: list[int]) -> fx.Node:
    args = list(node.args)
    args[: len(tensors)] = tensors
    defaults = [None, None, None, [1], [0], [1], 1]
    while len(args) < 5:
        args.append(defaults[len(args)] if len(args) != 2 else None)
    if len(tensors) == 2:
        args[2] = None
    args[4] = padding
    return part.local.call(node.target, *args, **{k: v for k, v in node.kwargs.items() if k not in ("padding", "bias")})
