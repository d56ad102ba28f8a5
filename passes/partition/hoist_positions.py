"""Takes positions out of structures, so that those of ranks, and of patches, that differ in nothing else are the same.

Which rows a structure takes of its inputs, where it puts rows in a tensor that stays, and the positions that it looks
up are numbers in its graph. Here slices of inputs are made in the root graph, where they cost nothing, and the rest
comes as inputs, with whatever tensors a structure held. One that did nothing but slice is gone then. What is left
compilers see once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import xdit_compile.kernels.put_rows  # noqa: F401  (registers the ops that the graphs call)
from xdit_compile.ir.arguments import integer_of, node_of, sequence_of
from xdit_compile.ir.digest import digest_tensors
from xdit_compile.ir.program import Input, Program
from xdit_compile.ir.subgraph import placeholders_first
from xdit_compile.passes.local.local_graph import ROWS

from .slice_results import slice_results

aten, ops = torch.ops.aten, torch.ops.xdit_compile
SCATTERS = "cuda"
"""Kind of devices for which inductor has the kernel that computes rows write each to its position."""


@dataclasses.dataclass(frozen=True)
class _Slice:
    """An argument that is a slice of the argument at ``position``."""

    position: int
    where: tuple[int, ...]

    def same(self, other: _Slice | _Positions) -> bool:
        """Whether the other is this one."""
        return self == other


@dataclasses.dataclass(frozen=True)
class _Positions:
    """An argument that holds positions."""

    value: torch.Tensor

    def same(self, other: _Slice | _Positions) -> bool:
        """Whether the other holds the same."""
        return isinstance(other, _Positions) and torch.equal(other.value, self.value)


@dataclasses.dataclass
class _Hoisted:
    """A structure without positions.

    Args:
        kept: which of the arguments it had it still takes.
        added: what it takes after these.
    """

    module: fx.GraphModule
    kept: list[int]
    added: list[_Slice | _Positions]


def hoist_positions(program: Program, device: torch.device) -> Program:
    """The same program with structures that hold no positions.

    Args:
        device: where positions are looked up.
    """
    return _Root(slice_results(program), device).run()


class _Root:
    """The root graph of a program while what its structures held is brought there."""

    def __init__(self, program: Program, device: torch.device):
        self._program, self._device = program, device
        self._graph = copy.deepcopy(program.root.graph)
        self._placeholders = self._graph.find_nodes(op="placeholder")
        self._inputs, self._constants = list(program.inputs), dict(program.constants)
        self._slices: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        self._tensors: dict[tuple[Any, ...], fx.Node] = {}

    def run(self) -> Program:
        scatters = self._device.type == SCATTERS
        hoisted = {name: _hoisted(each, scatters) for name, each in self._program.structures().items()}
        for call in self._graph.find_nodes(op="call_module"):
            found = hoisted[str(call.target)]
            added = [self._argument(call, each) for each in found.added]
            call.args = (*(call.args[position] for position in found.kept), *added)
        modules = {name: each.module for name, each in hoisted.items()}
        self._inline(modules)
        self._graph.lint()
        root = fx.GraphModule(modules, self._graph)
        return dataclasses.replace(self._program, root=root, inputs=tuple(self._inputs), constants=self._constants)

    def _argument(self, call: fx.Node, what: _Slice | _Positions) -> fx.Node:
        """One more argument of a call."""
        if isinstance(what, _Slice):
            return self._sliced(call.args[what.position], what.where)
        return self._constant(what.value)

    def _sliced(self, argument: Any, where: tuple[int, ...]) -> fx.Node:
        """A slice of what a call is given, made once for all calls."""
        key = (argument, where)
        if key not in self._slices:
            last = self._placeholders[-1] if argument.op == "placeholder" else argument
            with self._graph.inserting_after(last):
                self._slices[key] = self._graph.call_function(aten.slice.Tensor, (argument, *where))
        return self._slices[key]

    def _constant(self, value: torch.Tensor) -> fx.Node:
        """A tensor that structures held, as one more input of the root."""
        key = (value.shape, digest_tensors([value]))
        if key not in self._tensors:
            name = f"hoisted_{len(self._tensors)}"
            after = self._placeholders[len(self._inputs) - 1] if self._inputs else self._graph._root
            with self._graph.inserting_after(after):
                node = self._graph.placeholder(name)
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="meta")
            self._placeholders.insert(len(self._inputs), node)
            self._inputs.append(Input(node.name, "constant", node.name))
            self._constants[node.name] = value.to(self._device) if value.ndim else value
            self._tensors[key] = node
        return self._tensors[key]

    def _inline(self, modules: dict[str, fx.GraphModule]) -> None:
        """Have the root go without structures that give what they are given."""
        for name, module in list(modules.items()):
            results = sequence_of(module.graph.output_node().args[0])
            placeholders = module.graph.find_nodes(op="placeholder")
            if not all(leaf in placeholders for leaf in results):
                continue
            for call in [node for node in self._graph.find_nodes(op="call_module") if node.target == name]:
                for item in list(call.users):
                    item.replace_all_uses_with(call.args[placeholders.index(results[item.args[1]])])
                    self._graph.erase_node(item)
                self._graph.erase_node(call)
            del modules[name]


def _hoisted(structure: fx.GraphModule, scatters: bool) -> _Hoisted:
    module = fx.GraphModule(structure, copy.deepcopy(structure.graph))
    placeholders = placeholders_first(module.graph)
    added: list[_Slice | _Positions] = []
    if placeholders:
        for node in list(module.graph.nodes):
            _hoist(module, node, placeholders, added, scatters)
    used = bool(added) or any(node.users for node in placeholders)
    kept = [position for position, node in enumerate(placeholders) if node.users or not used]
    for position, node in enumerate(placeholders):
        if position not in kept:
            module.graph.erase_node(node)
    module.graph.lint()
    return _Hoisted(fx.GraphModule(module, module.graph), kept, added)


def _hoist(
    module: fx.GraphModule, node: fx.Node, placeholders: Sequence[fx.Node], added: list[_Slice | _Positions],
    scatters: bool,
) -> None:  # fmt: skip
    """Take the positions of one node out, if it has any."""
    graph = module.graph
    if _is_slice_of(node, placeholders):
        source = placeholders.index(node.args[0])
        where = tuple(map(integer_of, node.args[1:]))
        node.replace_all_uses_with(_taken(graph, _Slice(source, where), added))
        graph.erase_node(node)
    elif node.target is ops.put_rows.default and node.args[0] in placeholders:
        _hoist_put(graph, node, added, scatters)
    elif node.op == "get_attr":
        value = getattr(module, str(node.target))
        if isinstance(value, torch.Tensor):
            node.replace_all_uses_with(_taken(graph, _Positions(value), added))
            graph.erase_node(node)


def _hoist_put(graph: fx.Graph, node: fx.Node, added: list[_Slice | _Positions], scatters: bool) -> None:
    """Have rows put where an input says: from a number on, or each at a position of its own."""
    state, rows, dim, start = node.args
    if scatters and ROWS in node.meta:
        first = integer_of(start)
        positions = _taken(graph, _Positions(torch.arange(first, first + node.meta[ROWS])), added)
        node.target, node.args = aten.index_copy_.default, (state, dim, positions, rows)
    else:
        node.target = ops.put_rows_at.default
        node.args = (state, rows, dim, _taken(graph, _Positions(torch.tensor(start)), added))


def _is_slice_of(node: fx.Node, placeholders: Sequence[fx.Node]) -> bool:
    """Whether a node is a slice of an argument that nobody writes to, by numbers alone."""
    if node.target is not aten.slice.Tensor or node.args[0] not in placeholders or node.kwargs:
        return False
    return all(isinstance(each, int) for each in node.args[1:]) and not any(map(_writes, node_of(node.args[0]).users))


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _taken(graph: fx.Graph, what: _Slice | _Positions, added: list[_Slice | _Positions]) -> fx.Node:
    """The placeholder of one more argument; equal ones are one."""
    for number, known in enumerate(added):
        if known.same(what):
            return next(node for node in graph.find_nodes(op="placeholder") if node.name == f"hoisted_{number}")
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(f"hoisted_{len(added)}")
    added.append(what)
    return node
