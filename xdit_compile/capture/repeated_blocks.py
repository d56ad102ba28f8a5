"""Finding the repeated blocks of a recorded graph from the nest of its module calls and from structure alone."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.arguments import node_of

SMALLEST_BLOCK = 8
"""Fewer operators than this are not worth a call of their own."""


@dataclasses.dataclass
class Region:
    """Nodes that become one call: the module at ``path``, or (``""``) what lies between blocks."""

    path: str
    repeated: bool
    nodes: list[fx.Node]


@dataclasses.dataclass
class _Call:
    """One call of a module and the nodes recorded in it, at whatever depth."""

    path: str
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)

    @property
    def container(self) -> str:
        return self.path.rpartition(".")[0]


def find_regions(graph: fx.Graph) -> list[Region]:
    """Cut the operators of a graph into blocks and what lies between them, in an order in which they can run.

    A block is a call of a child of a container that is never called itself, or does nothing but call its children, and
    of which at least two children have the same structure; the outermost such containers count. All children of the
    container become blocks, also those of another structure (often the last).

    Args:
        graph: each computing node carries ``meta["calls"]`` as ``Trace`` describes.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    owner: dict[fx.Node, _Call] = {}
    for call in _choose("", nodes, 0):
        for node in call.nodes:
            owner[node] = call
    for node in nodes:
        if node.target is operator.getitem:
            source = node.args[0]
            if source in owner:
                owner[node] = owner[node_of(source)]
            else:
                owner.pop(node, None)
    return _runs(nodes, owner)


def _choose(path: str, nodes: list[fx.Node], depth: int) -> list[_Call]:
    calls: dict[str, _Call] = {}
    has_own_nodes = False
    for node in nodes:
        nest = node.meta["calls"]
        if len(nest) <= depth:
            has_own_nodes = True
            continue
        called, key = nest[depth]
        calls.setdefault(key, _Call(called)).nodes.append(node)
    groups: dict[str, list[_Call]] = {}
    for call in calls.values():
        groups.setdefault(call.container, []).append(call)
    chosen = []
    for container, members in groups.items():
        large = [call for call in members if len(call.nodes) >= SMALLEST_BLOCK]
        if (container != path or not has_own_nodes) and _repeats(large):
            chosen += large
        else:
            for call in large:
                chosen += _choose(call.path, call.nodes, depth + 1)
    return chosen


def _repeats(calls: list[_Call]) -> bool:
    keys = Counter(structural_key(call.nodes, external_values(call.nodes), (), strides=False) for call in calls)
    return any(count > 1 for count in keys.values())


def _runs(nodes: list[fx.Node], owner: dict[fx.Node, _Call]) -> list[Region]:
    regions: list[Region] = []
    last: Any = object()
    for node in nodes:
        call = owner.get(node)
        if call is not last:
            regions.append(Region(call.path if call else "", call is not None, []))
            last = call
        regions[-1].nodes.append(node)
    return regions


def external_values(nodes: list[fx.Node]) -> list[fx.Node]:
    """What nodes read from outside themselves, in the order of first use."""
    own = set(nodes)
    return list(dict.fromkeys(value for node in nodes for value in node.all_input_nodes if value not in own))


def used_outside(nodes: list[fx.Node]) -> list[fx.Node]:
    """Those of the nodes that others read."""
    own = set(nodes)
    return [node for node in nodes if any(user not in own for user in node.users)]


def structural_key(
    nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], *, strides: bool
) -> Hashable:
    """Equal for two lists of nodes that compute the same of their inputs: operators, constants, metadata and wiring.

    Args:
        strides: whether equal shapes with other strides count as different.
    """
    index = {node: i for i, node in enumerate([*inputs, *nodes])}

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", index[value])
        if isinstance(value, list | tuple):
            return tuple(encode(item) for item in value)
        if isinstance(value, dict):
            return tuple((key, encode(item)) for key, item in value.items())
        if isinstance(value, slice):
            return ("slice", encode(value.start), encode(value.stop), encode(value.step))
        return (type(value), repr(value) if isinstance(value, float) else value)

    def describe(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            layout = (value.stride(), value.storage_offset()) if strides else ()
            return (tuple(value.shape), value.dtype, value.device, layout)
        if isinstance(value, list | tuple):
            return tuple(describe(item) for item in value)
        return type(value)

    return (
        tuple(describe(node.meta.get("val")) for node in inputs),
        tuple((node.target, encode(node.args), encode(node.kwargs), describe(node.meta.get("val"))) for node in nodes),
        tuple(index[node] for node in outputs),
    )
