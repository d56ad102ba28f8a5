"""Runs of operators before a convolution of which every row depends on a few rows alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile.ir.arguments import node_of, sequence_of
from xdit_compile.passes.rules.piecewise import Operand, piecewise

from .on_meta import Shapes, name_of

CONVOLUTIONS = ("conv2d", "conv3d")
EXCHANGE = torch.ops.xdit_compile.halo_exchange.default


@dataclasses.dataclass(frozen=True)
class Region:
    """A convolution and the nodes before it of which every row depends on a few rows of what stands before them."""

    convolution: fx.Node
    nodes: frozenset[fx.Node]
    bytes: int


def regions_of(graph: fx.Graph, shapes: Shapes) -> list[Region]:
    """The regions of a structure, whatever they take, in the order of their convolutions."""
    regions = []
    for node in graph.nodes:
        if name_of(node) in CONVOLUTIONS and shapes[node].dim() >= 4 and shapes[node].numel():
            nodes = frozenset(_behind(node, shapes))
            if nodes:
                regions.append(Region(node, nodes, sum(_bytes(shapes[inner]) for inner in nodes)))
    return regions


def _behind(convolution: fx.Node, shapes: Shapes) -> list[fx.Node]:
    nodes, pending = [], [convolution.args[0]]
    while pending:
        node = pending.pop()
        if isinstance(node, fx.Node) and len(node.users) == 1 and (sources := sources_of(node, shapes)):
            nodes.append(node)
            pending += sources if name_of(node) != "group_norm" else []
    return nodes


def sources_of(node: fx.Node, shapes: Shapes) -> list[fx.Node]:
    """The operands of which a row-wise operator takes rows; none where it is not row-wise, or has one row."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(shapes[node], torch.Tensor):
        return []
    name, value = name_of(node), shapes[node]
    if value.dim() < 4 or value.shape[-2] < 2 or not value.numel():
        return []
    if name == "group_norm" or node.target is EXCHANGE and node.args[1] == value.dim() - 2 or is_zero_pad(node):
        return [node_of(node.args[0])]
    if "upsample_nearest" in name and name.endswith(("2d", "3d")):
        source = node_of(node.args[0])
        return [source] if value.shape[-2] % shapes[source].shape[-2] == 0 else []
    return _alike_in_rows(node, node.target, shapes)


def _alike_in_rows(node: fx.Node, target: torch._ops.OpOverload, shapes: Shapes) -> list[fx.Node]:
    """The operands of which an operator takes the rows that it makes, as its rule has it; none where it does not."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    value = shapes[node]
    first = next((each for each in nodes if _has_rows(shapes[each], value)), None)
    if first is None or not all(isinstance(shapes[each], torch.Tensor) for each in nodes):
        return []

    def known(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        return Operand(tuple(shapes[leaf].shape), shapes[leaf].dtype, 2 if leaf is first else None)

    how = piecewise(target, tuple(map(known, leaves)), spec, (1, value.shape[-2] - 1))
    if how is None or how.results != (2,) or how.contracts:
        return []
    uses = set(zip(nodes, how.operands, strict=True))
    sources = [each for each in dict.fromkeys(nodes) if (each, 2) in uses]
    return sources if len(uses) == len(set(nodes)) and all(back in (2, None) for _, back in uses) else []


def _has_rows(operand: Any, value: torch.Tensor) -> bool:
    return isinstance(operand, torch.Tensor) and operand.dim() == value.dim() and operand.shape[-2] == value.shape[-2]


def is_zero_pad(node: fx.Node) -> bool:
    """Whether a node puts zeros around its operand, and takes nothing off."""
    name = name_of(node)
    if name not in ("pad", "constant_pad_nd"):
        return False
    at = 3 if name == "pad" else 2
    value = node.args[at] if len(node.args) > at else node.kwargs.get("value")
    constant = name != "pad" or len(node.args) < 3 or node.args[2] == "constant"
    return constant and not value and min(sequence_of(node.args[1])) >= 0


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
