"""Has structures give a value as a whole where their results are columns of it, which the root graph takes then.

In the root a slice costs nothing, while compiled structures give every result in memory of its own: a copy for each.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.arguments import node_of, sequence_of
from xdit_compile.ir.program import Program

aten = torch.ops.aten


def slice_results(program: Program) -> Program:
    """The same program with structures of which several results were slices of one value along its last dim, of which
    they need nothing else, giving that value."""
    root = copy.deepcopy(program.root.graph)
    modules: dict[str, fx.GraphModule] = dict(program.structures())
    calls: dict[str, list[fx.Node]] = {name: [] for name in modules}
    for call in root.find_nodes(op="call_module"):
        calls[str(call.target)].append(call)
    changed = False
    for name, structure in program.structures().items():
        slices = _slices(structure.graph)
        if slices and not any(_leaves(item) for call in calls[name] for item in call.users if item.args[1] in slices):
            modules[name] = _giving_sources(structure, slices)
            for call in calls[name]:
                _slice_in_root(call, len(sequence_of(structure.graph.output_node().args[0])), slices)
            changed = True
    root.lint()
    return dataclasses.replace(program, root=fx.GraphModule(modules, root)) if changed else program


def _leaves(item: fx.Node) -> bool:
    return any(user.op == "output" for user in item.users)


def _slices(graph: fx.Graph) -> dict[int, fx.Node]:
    """Results that are slices of values of which a structure needs nothing else, several of one, by their positions."""
    results = sequence_of(graph.output_node().args[0])
    by_source: dict[fx.Node, dict[int, fx.Node]] = {}
    for position, leaf in enumerate(results):
        if isinstance(leaf, fx.Node) and leaf.target is aten.slice.Tensor and leaf.args[1] == -1:
            by_source.setdefault(node_of(leaf.args[0]), {})[position] = leaf
    return {
        position: leaf
        for source, leaves in by_source.items()
        if len(leaves) > 1 and source.op == "call_function" and set(source.users) <= {*leaves.values()}
        for position, leaf in leaves.items()
        if set(leaf.users) == {graph.output_node()}
    }


def _giving_sources(structure: fx.GraphModule, slices: dict[int, fx.Node]) -> fx.GraphModule:
    """A structure that gives what results were slices of, behind its other results."""
    module = fx.GraphModule(structure, copy.deepcopy(structure.graph))
    output = module.graph.output_node()
    results = sequence_of(output.args[0])
    sources = dict.fromkeys(node_of(node_of(results[position]).args[0]) for position in slices)
    output.args = ((*(leaf for at, leaf in enumerate(results) if at not in slices), *sources),)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    return fx.GraphModule(module, module.graph)


def _slice_in_root(call: fx.Node, count: int, slices: dict[int, fx.Node]) -> None:
    """Take the results of one call where they are now.

    Args:
        count: how many results there were.
    """
    graph, kept = call.graph, [position for position in range(count) if position not in slices]
    sources = list(dict.fromkeys(node_of(leaf.args[0]) for leaf in slices.values()))
    wholes: dict[fx.Node, fx.Node] = {}
    for item in list(call.users):
        position: Any = item.args[1]
        if position in kept:
            item.args = (call, kept.index(position))
            continue
        source, *where = sequence_of(slices[position].args)
        if source not in wholes:
            with graph.inserting_after(call):
                wholes[source] = graph.call_function(operator.getitem, (call, len(kept) + sources.index(source)))
        with graph.inserting_before(item):
            taken = graph.call_function(aten.slice.Tensor, (wholes[source], *where))
        taken.meta.update(item.meta)
        item.replace_all_uses_with(taken)
        graph.erase_node(item)
