"""Parts of a graph: what a value is made of, and graphs of their own made of some nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx


def reached(results: Iterable[object], goes_on: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes of ``results``, and those behind them, as far as ``goes_on`` says yes; the others are left out."""
    nodes: set[fx.Node] = set()
    pending = [leaf for leaf in results if isinstance(leaf, fx.Node)]
    while pending:
        node = pending.pop()
        if node not in nodes and goes_on(node):
            nodes.add(node)
            pending += node.all_input_nodes
    return nodes


def subgraph(inputs: Mapping[fx.Node, str], nodes: Iterable[fx.Node], outputs: Sequence[object]) -> fx.Graph:
    """A graph of its own from nodes of another.

    Args:
        inputs: what becomes a placeholder, and its name there; it keeps its ``val`` alone.
        nodes: what is copied as it is, in an order in which it can run.
        outputs: what the graph gives, as a flat tuple; what is no node is given as it is.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node, name in inputs.items():
        copies[node] = graph.placeholder(name)
        copies[node].meta["val"] = node.meta["val"]
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    leaves: list[Any] = [copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in outputs]
    graph.output(tuple(leaves))
    return graph


def placeholders_first(graph: fx.Graph) -> list[fx.Node]:
    """Put the placeholders of a graph before all else, in their order, so that further ones can follow them."""
    placeholders: list[fx.Node] = graph.find_nodes(op="placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in placeholders:
        first.prepend(node)
    return placeholders
