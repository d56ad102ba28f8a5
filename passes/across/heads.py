"""Norms at the begin of a structure, with the arithmetic around them: what another structure could compute as well."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.cache.graphs import canonical
from xdit_compile.cache.unportable import Unportable
from xdit_compile.capture.mutations import Memory, written_arguments
from xdit_compile.ir.subgraph import reached

aten = torch.ops.aten
NORMS = (aten.layer_norm, aten.rms_norm)
REDUCTIONS = (aten.mean, aten.sum, aten.var, aten.var_mean, aten.linalg_vector_norm)
VIEWS = (
    aten.reshape, aten.view, aten._unsafe_view, aten.flatten, aten.unflatten, aten.transpose, aten.permute, aten.t,
    aten.unsqueeze, aten.squeeze, aten.expand, aten.slice, aten.select, aten.narrow, aten.split, aten.split_with_sizes,
    aten.chunk, aten.unbind, aten.detach,
)  # fmt: skip
"""Operators that move nothing."""
COPIES = (aten.clone, aten.contiguous, aten._to_copy, aten.to, aten.type_as)
LATE = "arithmetic reads it together with what is computed later"


@dataclasses.dataclass(frozen=True)
class Head:
    """Norms at the begin of a structure, and what is made of them until the first operator that is no arithmetic.

    Args:
        outputs: the nodes that the rest of the structure reads.
        nodes: all that these are made of, in order.
        placeholders: the arguments among what they are made of.
        positions: of these among the arguments of the structure.
        reduced: for each of them whether a norm reads what is made of it.
        norms: how many norms there are.
        digest: equal for heads that compute the same.
    """

    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    placeholders: tuple[fx.Node, ...]
    positions: tuple[int, ...]
    reduced: tuple[bool, ...]
    norms: int
    digest: str


def heads_of(structure: fx.GraphModule) -> tuple[list[Head], Counter[str]]:
    """The heads of a structure, those that share a node behind a norm as one; and why some norms there are in none.

    A norm reduces each row of the last dims by itself. One whose dims ranks share is none here: ranks meet in it.
    """
    graph = structure.graph
    early = _early(graph)
    starts = {node for node in early if is_norm(node)}
    behind = reached(starts, lambda node: node in early)
    starts |= {node for node in behind if _packet(node) is aten.cat}
    core = dict[fx.Node, None]()
    for node in graph.nodes:
        if node in starts or (node in early and any(each in core for each in node.all_input_nodes)):
            core[node] = None
    heads, apart = list[Head](), Counter[str]()
    for nodes in _connected(core):
        norms = [node for node in nodes if is_norm(node)]
        outputs = [node for node in nodes if not all(user in core for user in node.users)]
        head = _head(graph, outputs, norms) if norms and all(map(_is_wanted, outputs)) else None
        if head is None:
            apart[LATE] += len(norms)
        else:
            heads.append(head)
    return heads, apart


def is_arithmetic(node: fx.Node) -> bool:
    """Whether a node computes every element of some of its operands' at the same place, and reduces nothing."""
    op = node.target
    return _is_plain(node) and (_packet(node) in COPIES or torch.Tag.pointwise in getattr(op, "tags", ()))


def is_view(node: fx.Node) -> bool:
    """Whether a node moves nothing."""
    return node.op == "call_function" and (node.target is operator.getitem or _packet(node) in VIEWS)


def is_movable(node: fx.Node) -> bool:
    """Whether heads can be made of it."""
    return is_arithmetic(node) or is_view(node) or is_norm(node) or _packet(node) is aten.cat


def is_norm(node: fx.Node) -> bool:
    """Whether a node reduces the last dims of a value."""
    if not _is_plain(node):
        return False
    if _packet(node) in REDUCTIONS:
        return any(list(each) == [-1] for each in node.args[1:] if isinstance(each, list | tuple))
    return _packet(node) in NORMS


def _early(graph: fx.Graph) -> set[fx.Node]:
    """What can be computed before all else: of arguments that nobody writes to, by operators that loops fuse."""
    memory = Memory(graph)
    written = {memory.root(value) for node in graph.nodes for value in written_arguments(node)}
    early = set[fx.Node]()
    for node in graph.nodes:
        if memory.root(node) in written:
            continue
        if node.op == "placeholder" or (is_movable(node) and early.issuperset(node.all_input_nodes)):
            early.add(node)
    return early


def _is_wanted(node: fx.Node) -> bool:
    """Whether a value is in memory anyway, as something reads it that is no arithmetic; streams side by side are."""
    return _packet(node) is aten.cat or not all(is_arithmetic(user) or is_view(user) for user in node.users)


def standalone(head: Head) -> fx.Graph:
    """A head as a graph of its own, with placeholders for its arguments, of whose values nothing is said."""
    return _standalone(head.placeholders, head.nodes, head.outputs)


def _standalone(placeholders: Iterable[fx.Node], nodes: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in placeholders}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    graph.output(tuple(copies[node] for node in outputs))
    return graph


def _head(graph: fx.Graph, outputs: Sequence[fx.Node], norms: Sequence[fx.Node]) -> Head | None:
    inside = reached(outputs, lambda node: True)
    positions = {node: k for k, node in enumerate(graph.find_nodes(op="placeholder")) if node in inside}
    nodes = tuple(node for node in graph.nodes if node in inside and node not in positions)
    try:
        _, digest = canonical(fx.GraphModule({}, _standalone(positions, nodes, outputs)))
    except Unportable:
        return None
    behind = reached([node.args[0] for node in norms], lambda node: True)
    reduced = tuple(node in behind for node in positions)
    return Head(tuple(outputs), nodes, tuple(positions), tuple(positions.values()), reduced, len(norms), digest)


def _connected(core: Collection[fx.Node]) -> list[list[fx.Node]]:
    """Nodes in groups of which none reads a node of another, each in order."""
    group = dict[fx.Node, int]()
    for number, node in enumerate(core):
        met = {group[each] for each in node.all_input_nodes if each in core}
        group[node] = number
        group = {each: number if other in met else other for each, other in group.items()}
    together = dict[int, list[fx.Node]]()
    for node in core:
        together.setdefault(group[node], []).append(node)
    return list(together.values())


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _is_plain(node: fx.Node) -> bool:
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return False
    return not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags
