"""Which nodes of a graph have the same value, as the same operators of the same arguments do."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from xdit_compile.ir.arguments import node_of

aten = torch.ops.aten
MAY_ALIAS = (aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints, aten.to.dtype)
"""Operators that give the tensor itself where nothing has to be done, of which their schemas say nothing."""


class EqualValues:
    """The nodes of a graph by their values.

    A node that somebody writes to, or to what it is a view of, equals no other.
    """

    def __init__(self, graph: fx.Graph):
        self._written = {_origin(node) for each in graph.nodes for node in _written_by(each)}
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
        return _origin(node) in self._written

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


def erase_unused(node: fx.Node) -> None:
    """Take a node out of its graph, and what only it used, as far as that is pure."""
    if node.users or not is_pure(node):
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for each in inputs:
        erase_unused(each)


def _origin(node: fx.Node) -> fx.Node:
    """The node in whose memory another one's value may lie."""
    while node.all_input_nodes and _is_view(node.target):
        node = node.all_input_nodes[0]
    return node


def _is_view(op: object) -> bool:
    """Whether what is called may give the memory of its first argument, or one of several results."""
    if not isinstance(op, torch._ops.OpOverload):
        return op is operator.getitem
    return op in MAY_ALIAS or any(each.alias_info for each in op._schema.returns)


def _written_by(node: fx.Node) -> list[fx.Node]:
    """What a node writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = zip(node.target._schema.arguments, node.args, strict=False)
    written = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
    return [node_of(value) for value in written if isinstance(value, fx.Node)]
