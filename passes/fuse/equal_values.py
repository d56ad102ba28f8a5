"""Which nodes of a graph have the same value, as the same operators of the same arguments do."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from xdit_compile.capture.mutations import Memory, written_arguments


class EqualValues:
    """The nodes of a graph by their values.

    A node that somebody writes to, or to what it is a view of, equals no other.
    """

    def __init__(self, graph: fx.Graph):
        self._memory = Memory(graph)
        self._written = {self._memory.root(value) for node in graph.nodes for value in written_arguments(node)}
        self._first: dict[fx.Node, fx.Node] = {}
        known: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            key = self._key(node)
            self._first[node] = node if key is None else known.setdefault(key, node)

    def first(self, node: fx.Node) -> fx.Node:
        """The first node of the same value."""
        return self._first[node]

    def is_written(self, node: fx.Node) -> bool:
        """Whether the value changes while the graph runs."""
        return self._memory.root(node) in self._written

    def _key(self, node: fx.Node) -> Any:
        """What nodes of equal value have in common; None for one that is like no other."""
        if node.op == "get_attr":
            return node.target
        if not is_pure(node) or any(map(self.is_written, [node, *node.all_input_nodes])):
            return None
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: self._first[each])
        return node.target, str(args), str(kwargs)


def is_pure(node: fx.Node) -> bool:
    """Whether a node does nothing but compute its value of its arguments, without drawing anything."""
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return False
    return not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags
