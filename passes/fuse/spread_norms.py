"""Writes how a norm is applied whose statistics are known as arithmetic, which compilers fuse with what is around it.

The operator that stands for it runs as one batch norm, without a copy in the dtype of the factors where nothing
compiles. For a card inductor lays that out channel by channel, and writes it again for whoever wants another layout.
"""

from __future__ import annotations

import torch
from torch import fx

import xdit_compile.kernels.scale_shift  # noqa: F401  (registers the op)
from xdit_compile.ir.arguments import node_of
from xdit_compile.passes.memory.on_meta import Shapes

from .rewriting import Fusion
from .selection import Chooser, Cost, Found, Site, bytes_of

aten = torch.ops.aten


def _rewrite(graph: fx.Graph, shapes: Shapes, chooser: Chooser) -> Found:
    result = Found()
    for node in graph.find_nodes(op="call_function", target=torch.ops.xdit_compile.scale_shift.default):
        if result.takes(chooser.choose(_site(node, shapes), shapes)):
            _spread(node, shapes)
    return result


def _site(node: fx.Node, shapes: Shapes) -> Site:
    """One kernel; by itself it makes a result that is written again where another layout is wanted."""
    moved = bytes_of([*node.all_input_nodes, node], shapes)
    return Site(tuple(node.all_input_nodes), (node,), Cost(moved + 2 * shapes[node].nbytes, 2), Cost(moved, 1))


def _spread(node: fx.Node, shapes: Shapes) -> None:
    x, scale, shift = map(node_of, node.args)
    graph, narrow, wide = node.graph, shapes[x].dtype, shapes[scale].dtype
    with graph.inserting_before(node):
        value = x if narrow == wide else graph.call_function(aten._to_copy.default, (x,), {"dtype": wide})
        value = graph.call_function(aten.mul.Tensor, (value, scale))
        value = graph.call_function(aten.add.Tensor, (value, shift))
        if narrow != wide:
            value = graph.call_function(aten._to_copy.default, (value,), {"dtype": narrow})
    node.replace_all_uses_with(value)
    graph.erase_node(node)


spread_norms = Fusion("spread_norms", "norms of known statistics applied as arithmetic", _rewrite)
"""The pass; which norms those are is the same in every call of a structure."""
