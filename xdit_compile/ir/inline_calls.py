"""One graph of a root graph and the structures that it calls."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn


def flatten(root: fx.GraphModule) -> fx.GraphModule:
    """The graphs of all calls written out in one.

    A call holds its arguments until it returns. In one graph each value ends with its last use, which is what counts
    where memory is short.
    """
    owner, graph = nn.Module(), fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in root.graph.nodes:
        if node.op == "call_module":
            values[node] = _written_out(node, getattr(root, str(node.target)), graph, owner, values)
        elif node.target is operator.getitem and isinstance(values.get(node.args[0]), tuple):
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], values.__getitem__))
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    return fx.GraphModule(owner, graph)


def _written_out(
    call: fx.Node, structure: fx.GraphModule, graph: fx.Graph, owner: nn.Module, values: dict[fx.Node, Any]
) -> Any:
    given = fx.node.map_arg(call.args, values.__getitem__)
    inner = dict(zip(structure.graph.find_nodes(op="placeholder"), given, strict=True))
    for node in structure.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], inner.__getitem__)
        if node.op == "get_attr":
            name = f"{call.target}_{node.target}".replace(".", "_")
            if not hasattr(owner, name):
                owner.register_buffer(name, getattr(structure, str(node.target)), persistent=False)
            inner[node] = graph.get_attr(name)
        elif node.op != "placeholder":
            inner[node] = graph.node_copy(node, inner.__getitem__)
    raise AssertionError("a graph without output")
