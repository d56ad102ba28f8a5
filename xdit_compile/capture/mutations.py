"""What the nodes of a graph write in place, which of them share memory, and how to do without a write."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.arguments import node_of, overload_of

aten = torch.ops.aten

CONVERSIONS = {aten.to, aten.type_as, aten.contiguous, aten.dropout, aten.feature_dropout, aten.detach, aten.detach_}
"""Operators that return their argument itself where there is nothing to do."""


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by the names of its schema."""
    schema = overload_of(node)._schema
    return {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node writes in place, by its operator's schema."""
    return [] if node.target is aten.detach_.default else _arguments(node, write=True)


def aliased_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors whose memory a node's result may share."""
    if node.target is operator.getitem or getattr(node.target, "overloadpacket", None) in CONVERSIONS:
        return [value for value in node.args[:1] if isinstance(value, fx.Node)]
    return _arguments(node, write=False)


def _arguments(node: fx.Node, write: bool) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    arguments, operands = named_arguments(node), []
    for argument in schema.arguments:
        if argument.alias_info is not None and (argument.alias_info.is_write or not write):
            value = arguments.get(argument.name)
            values = value if isinstance(value, list | tuple) else [value]
            operands += [item for item in values if isinstance(item, fx.Node)]
    return operands


def spell_out_diagonals(graph: fx.Graph) -> None:
    """State writes to diagonals by positions that are equal.

    PyTorch writes through strides, which have no functional form where the tensor is a view itself.
    """
    for node in graph.find_nodes(op="call_function", target=aten.fill_diagonal_.default):
        arguments = named_arguments(node)
        with graph.inserting_before(node):
            mask = _diagonal(node, node_of(node.args[0]).meta["val"], bool(arguments.get("wrap")))
        node.target, node.args, node.kwargs = (
            aten.masked_fill_.Scalar,
            (node.args[0], mask, arguments["fill_value"]),
            {},
        )


def _diagonal(node: fx.Node, value: torch.Tensor, wraps: bool) -> fx.Node:
    """Where the indices of a tensor (2 dims, or more of one size) are equal, of its shape; with ``wraps`` a matrix
    begins another diagonal one row below the end of the one before."""
    places = []
    for dim, size in enumerate(value.shape):
        place = _added(node, aten.arange.default, size, device=value.device)
        if wraps and value.dim() == 2 and dim == 0:
            place = _added(node, aten.remainder.Scalar, place, value.shape[1] + 1)
        places.append(_added(node, aten.view.default, place, [size] + [1] * (value.dim() - dim - 1)))
    equal = [_added(node, aten.eq.Tensor, one, other) for one, other in zip(places, places[1:], strict=False)]
    return functools.reduce(lambda one, other: _added(node, aten.logical_and.default, one, other), equal)


def _added(like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node beside another, which belongs to the same calls."""
    node = like.graph.call_function(target, args, kwargs)
    node.meta.update({key: like.meta[key] for key in ("calls", "stack_trace") if key in like.meta})
    given, options = fx.node.map_arg((args, kwargs), lambda source: source.meta["val"])
    with like.meta["val"].fake_mode:
        node.meta["val"] = target(*given, **options)
    return node


def rewrite_writes(graph: fx.Graph) -> None:
    """Turn writes in place into new values where nobody can tell: no other view of the memory is read afterwards."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory = Memory(graph)
    for node in list(graph.nodes):
        if not node.args or written_arguments(node) != [node.args[0]]:
            continue
        target, written = _out_of_place(node), node.args[0]
        family = memory.family(written)
        if target is None or any(member.op == "placeholder" for member in family):
            continue
        others = [member for member in family if member not in (written, node) and order[member] < order[node]]
        if any(order.get(user, len(order)) > order[node] for member in others for user in member.users):
            continue
        value = _value(target, node)
        if not isinstance(value, torch.Tensor) or _layout(value) != _layout(node.meta["val"]):
            continue
        node.target = target
        written.replace_all_uses_with(node, functools.partial(_stands_after, order, node))


def _stands_after(order: Mapping[fx.Node, int], node: fx.Node, user: fx.Node) -> bool:
    return order.get(user, len(order)) > order[node]


def drop_copies(graph: fx.Graph) -> None:
    """Erase the copies that Python makes of a constant each time it runs, where nobody writes to them."""
    memory = Memory(graph)
    written = {memory.root(target) for node in graph.nodes for target in written_arguments(node)}
    for node in graph.find_nodes(op="call_function", target=aten.lift_fresh_copy.default):
        if memory.root(node) not in written:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    return (value.dtype, value.shape, value.stride(), value.device)


def _out_of_place(node: fx.Node) -> Any:
    """The operator that gives as a new tensor what this one writes into its first argument: the overload that takes the
    same, as overloads of the two are not always named alike."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or not packet.__name__.endswith("_") or packet.__name__.endswith("__"):
        return None
    functional = getattr(aten, packet.__name__[:-1], None)
    if functional is None:
        return None
    types = [str(argument.type) for argument in overload_of(node)._schema.arguments]
    overloads = (getattr(functional, name) for name in functional.overloads())
    return next((one for one in overloads if [str(each.type) for each in one._schema.arguments] == types), None)


def _value(target: Any, node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    with node.meta["val"].fake_mode:
        return target(*args, **kwargs)


class Memory:
    """Which nodes of a graph may share memory, followed through every operator whose schema allows it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.above: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            for source in aliased_arguments(node):
                self.above[self.root(node)] = self.root(source)
        self.members: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self.members.setdefault(self.root(node), []).append(node)

    def root(self, node: fx.Node) -> fx.Node:
        """The node that stands for all that share memory with this one."""
        while self.above.get(node, node) is not node:
            node = self.above[node]
        return node

    def family(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that may share memory with this one, itself among them."""
        return self.members[self.root(node)]
