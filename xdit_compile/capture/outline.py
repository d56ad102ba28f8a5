"""Cutting a recorded graph into prologue, blocks and epilogue, each distinct structure kept once."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable

import torch
from torch import fx

from xdit_compile.ir.arguments import sequence_of
from xdit_compile.ir.program import Input
from xdit_compile.ir.subgraph import subgraph

from .decompose import check_static, clean, lower
from .mutations import Memory, drop_copies, rewrite_writes, spell_out_diagonals, written_arguments
from .repeated_blocks import Region, external_values, find_regions, structural_key, used_outside
from .simplify import simplify
from .tracing import Trace


def outline(trace: Trace) -> tuple[fx.GraphModule, tuple[Input, ...]]:
    """Cut a trace into calls of distinct structures.

    A write in place that reaches over a cut is made a new value first; where that cannot be the graph stays whole.

    Returns:
        The root graph of a ``Program`` and the placeholders that it uses.

    Raises:
        CaptureError: where a part of the graph has no functional form, or a size depends on data.
    """
    graph = trace.graph.graph
    simplify(trace.graph)
    for node in graph.nodes:
        if node.users:
            check_static(node)
    spell_out_diagonals(graph)
    rewrite_writes(graph)
    drop_copies(graph)
    regions = find_regions(graph)
    if not trace.functional and writes_across(graph, regions):
        if trace.functionalize is not None:
            return outline(trace.functionalize())
        regions = [Region("", False, [node for region in regions for node in region.nodes])]
    return _Assembly(trace).build(regions)


def writes_across(graph: fx.Graph, regions: list[Region]) -> bool:
    """Whether some node writes to memory that comes from an earlier region or from the caller."""
    home = {node: number for number, region in enumerate(regions) for node in region.nodes}
    memory = Memory(graph)
    return any(
        home.get(member, -1) < home[node]
        for node in graph.nodes
        for written in written_arguments(node)
        for member in memory.family(written)
    )


@dataclasses.dataclass
class _Structure:
    """One lowered part as it is called: which inputs it takes and where each output of the region comes from.

    ``sources`` holds for each output ``("result", i)`` or, where the part hands an input through, ``("input", i)``.
    """

    name: str
    module: fx.GraphModule
    inputs: list[int]
    sources: list[tuple[str, int]]


class _Assembly:
    """Builds the root graph of a trace from its regions."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.root = fx.GraphModule(torch.nn.Module(), fx.Graph())
        self.values: dict[fx.Node, fx.Node] = {}
        self.recorded: dict[Hashable, _Structure] = {}
        self.lowered: dict[Hashable, _Structure] = {}

    def build(self, regions: list[Region]) -> tuple[fx.GraphModule, tuple[Input, ...]]:
        graph = self.root.graph
        for node in self.trace.graph.graph.find_nodes(op="placeholder"):
            self.values[node] = graph.placeholder(node.name)
            self.values[node].meta["val"] = node.meta["val"]
        outputs = _common_outputs(regions)
        for region, places in zip(regions, outputs, strict=True):
            if places:
                self._call(region, [region.nodes[i] for i in places])
        result = self.trace.graph.graph.output_node().args[0]
        graph.output(tuple(self.values[node] for node in sequence_of(result)))
        return self.root, self._drop_unused()

    def _drop_unused(self) -> tuple[Input, ...]:
        graph, kept = self.root.graph, []
        for node in reversed(graph.nodes):
            if node.op in ("call_module", "call_function") and not node.users:
                graph.erase_node(node)
        for spec, node in zip(self.trace.inputs, graph.find_nodes(op="placeholder"), strict=True):
            if node.users:
                kept.append(dataclasses.replace(spec, name=node.name))
            else:
                graph.erase_node(node)
        self.root.recompile()
        self.root.delete_all_unused_submodules()
        return tuple(kept)

    def _call(self, region: Region, outputs: list[fx.Node]) -> None:
        inputs = external_values(region.nodes)
        key = structural_key(region.nodes, inputs, outputs, strides=True)
        if key not in self.recorded:
            self.recorded[key] = self._structure(region.nodes, inputs, outputs)
        structure = self.recorded[key]
        graph = self.root.graph
        call = graph.call_module(structure.name, tuple(self.values[inputs[i]] for i in structure.inputs))
        vals = tuple(node.meta["val"] for node in _results(structure.module))
        call.meta.update(path=region.path, repeated=region.repeated, val=vals)
        items: dict[int, fx.Node] = {}
        for node, (kind, place) in zip(outputs, structure.sources, strict=True):
            if kind == "input":
                self.values[node] = self.values[inputs[place]]
            else:
                if place not in items:
                    items[place] = graph.call_function(operator.getitem, (call, place))
                    items[place].meta["val"] = vals[place]
                self.values[node] = items[place]

    def _structure(self, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> _Structure:
        graph = subgraph({node: node.name for node in inputs}, nodes, outputs)
        submodule = fx.GraphModule(torch.nn.Module(), graph)
        if self.trace.functional:
            clean(submodule)
        else:
            submodule = lower(submodule)
        taken, sources = _tighten(submodule)
        holders = submodule.graph.find_nodes(op="placeholder")
        body = [node for node in submodule.graph.nodes if node.op == "call_function"]
        key = (structural_key(body, holders, _results(submodule), strides=False), tuple(taken), tuple(sources))
        if key not in self.lowered:
            name = f"part_{len(self.lowered)}"
            self.root.add_submodule(name, submodule)
            self.lowered[key] = _Structure(name, submodule, taken, sources)
        return self.lowered[key]


def _common_outputs(regions: list[Region]) -> list[list[int]]:
    """For each region the positions of the nodes that somebody reads, of it or of a region of the same structure."""
    keys = [structural_key(region.nodes, external_values(region.nodes), (), strides=False) for region in regions]
    read: dict[Hashable, set[int]] = {}
    for key, region in zip(keys, regions, strict=True):
        outside = set(used_outside(region.nodes))
        read.setdefault(key, set()).update(i for i, node in enumerate(region.nodes) if node in outside)
    return [sorted(read[key]) for key in keys]


def _results(module: fx.GraphModule) -> list[fx.Node]:
    return list(sequence_of(module.graph.output_node().args[0]))


def _tighten(submodule: fx.GraphModule) -> tuple[list[int], list[tuple[str, int]]]:
    """Take unused placeholders and repeated or handed-through outputs out of a part, and say where they went."""
    graph = submodule.graph
    holders = graph.find_nodes(op="placeholder")
    kept: list[fx.Node] = []
    sources: list[tuple[str, int]] = []
    for value in _results(submodule):
        if value.op == "placeholder":
            sources.append(("input", holders.index(value)))
            continue
        if value not in kept:
            kept.append(value)
        sources.append(("result", kept.index(value)))
    graph.output_node().args = (tuple(kept),)
    graph.eliminate_dead_code()
    taken = [i for i, node in enumerate(holders) if node.users]
    for node in holders:
        if not node.users:
            graph.erase_node(node)
    submodule.recompile()
    return taken, sources
