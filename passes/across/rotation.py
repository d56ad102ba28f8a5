"""Rewrites a program so that calls compute, behind what they did, the heads of structures that are called later."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx

from xdit_compile.ir.arguments import integer_of, sequence_of
from xdit_compile.ir.subgraph import placeholders_first
from xdit_compile.passes.memory.on_meta import Shapes

from .heads import Head, standalone
from .joined_slices import erase_unread, join_slices

aten = torch.ops.aten
ROW_BY_ROW: dict[str, Any] = {"memory_format": torch.contiguous_format}
NAME = "norms"
"""What structures are called that compute a head and nothing else."""
Wire = tuple[Literal["result", "argument", "further"], int, tuple[tuple[Any, ...], ...]]
"""Where a call has an argument of a head: among its results or its arguments, or among what it is given further; and
the slices that the root takes of a result."""


@dataclasses.dataclass(frozen=True)
class Tail:
    """A head that is computed before the call whose structure it leaves.

    Args:
        call: that is given what it makes.
        number: which of the heads of its structure it is.
        head: what is computed.
        wires: where the call that computes it has each of its arguments.
        values: these arguments, in the root.
    """

    call: fx.Node
    number: int
    head: Head
    wires: tuple[Wire, ...]
    values: tuple[fx.Node, ...]

    @property
    def form(self) -> Any:
        """Equal for tails with which equal structures stay equal."""
        return self.head.digest, self.wires

    @property
    def further(self) -> list[fx.Node]:
        """What the call that computes it has to be given further, in order."""
        pairs = zip(self.wires, self.values, strict=True)
        return list({number: value for (kind, number, _), value in pairs if kind == "further"}.values())


class Rotation:
    """The root graph of a program while heads leave its structures.

    Args:
        root: which is changed.
        leaving: by the names of structures the heads that leave them, by their numbers.
        tails: what calls compute for later ones.
        alone: what is computed in calls of their own.
        rows: by the names of structures their results that are laid out row by row.
        shapes: what nodes of structures yield.
    """

    def __init__(
        self, root: fx.GraphModule, leaving: Mapping[str, Mapping[int, Head]],
        tails: Mapping[fx.Node, Sequence[Tail]], alone: Sequence[Tail], rows: Mapping[str, set[int]], shapes: Shapes,
    ):  # fmt: skip
        self._graph = root.graph
        self._modules = {name: each for name, each in root.named_children() if isinstance(each, fx.GraphModule)}
        self._leaving, self._tails, self._alone = leaving, tails, alone
        self._rows, self._shapes = rows, shapes
        self._computing: dict[str, str] = {}
        self._made: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        self._order = {node: number for number, node in enumerate(root.graph.nodes)}

    def run(self) -> fx.GraphModule:
        """The root with structures as they are then."""
        changing = {*self._leaving, *self._rows, *(str(call.target) for call in self._tails)}
        alike: dict[Any, list[fx.Node]] = {}
        for call in self._graph.find_nodes(op="call_module"):
            name, tails = str(call.target), self._tails.get(call, ())
            self._compute_behind(call, tails)
            if name in changing:
                alike.setdefault((name, *(tail.form for tail in tails)), []).append(call)
        for tail in self._alone:
            self._compute_alone(tail)
        modules = {name: each for name, each in self._modules.items() if all(key[0] != name for key in alike)}
        changed = dict[str, list[fx.Node]]()
        for (name, *_), calls in sorted(alike.items(), key=lambda pair: -len(pair[1])):
            free = _free(name, modules)
            modules[free] = self._variant(name, self._tails.get(calls[0], ()))
            changed[free] = calls
            for call in calls:
                self._give(call)
                call.target = free
        while sum(_tidied(modules[name], calls) for name, calls in changed.items()):
            pass
        root = fx.GraphModule(modules, self._graph)
        root.graph.lint()
        return root

    def _compute_behind(self, call: fx.Node, tails: Sequence[Tail]) -> None:
        """Take the results of a call's tails in the root."""
        after, count = call, len(_results(self._modules[str(call.target)].graph))
        for tail in tails:
            self._made[tail.call, tail.number] = items = []
            for _ in tail.head.outputs:
                with self._graph.inserting_after(after):
                    after = self._graph.call_function(operator.getitem, (call, count))
                items.append(after)
                count += 1

    def _compute_alone(self, tail: Tail) -> None:
        """Compute a head right before the call that reads it; what computes equal ones is one structure."""
        if tail.head.digest not in self._computing:
            target = self._computing[tail.head.digest] = _free(NAME, self._modules)
            self._modules[target] = fx.GraphModule({}, standalone(tail.head))
        target = self._computing[tail.head.digest]
        with self._graph.inserting_before(tail.call):
            made = self._graph.create_node("call_module", target, tail.values)
            made.meta.update(path="", repeated=False)
            items = [self._graph.call_function(operator.getitem, (made, k)) for k in range(len(tail.head.outputs))]
        self._made[tail.call, tail.number] = items

    def _give(self, call: fx.Node) -> None:
        """Give a call the results of its heads, and what its tails need."""
        made = [value for number in self._leaving.get(str(call.target), ()) for value in self._made[call, number]]
        further = [value for tail in self._tails.get(call, ()) for value in tail.further]
        for value in further:
            self._bring(value, call)
        call.args = (*call.args, *made, *further)

    def _bring(self, value: fx.Node, call: fx.Node) -> None:
        """Have a value, which depends on nothing that comes after a call, stand before it."""
        if value.op != "placeholder" and self._order[value] > self._order[call]:
            for source in value.all_input_nodes:
                self._bring(source, call)
            call.prepend(value)
            self._order[value] = self._order[call]

    def _variant(self, name: str, tails: Sequence[Tail]) -> fx.GraphModule:
        """A structure that is given the results of its heads, and computes some tails."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        returned = graph.graph_copy(self._modules[name].graph, copies, return_output_node=True)
        assert isinstance(returned, tuple)
        output, arguments = graph.output(returned[0]), placeholders_first(graph)
        outputs = [copies[node] for head in self._leaving.get(name, {}).values() for node in head.outputs]
        for node in outputs:
            node.replace_all_uses_with(_further(graph, "normed"))
        results = _results(graph)
        appended = list[Any]()
        with graph.inserting_before(output):
            for k in self._rows.get(name, ()):
                results[k] = graph.call_function(aten.clone.default, (results[k],), ROW_BY_ROW)
            for tail in tails:
                appended += _append(graph, tail, results, arguments)
        output.args = ((*results, *appended),)
        for node in outputs:
            erase_unread(node)
        join_slices(graph, {copied: self._shapes[node] for node, copied in copies.items() if node in self._shapes})
        graph.lint()
        return fx.GraphModule(self._modules[name], graph)


def _append(
    graph: fx.Graph, tail: Tail, results: Sequence[fx.Node], arguments: Sequence[fx.Node]
) -> list[fx.Node]:  # fmt: skip
    """Compute a tail; what it needs beside results and arguments becomes further arguments."""
    head, further = standalone(tail.head), dict[int, fx.Node]()
    copies = dict[fx.Node, fx.Node]()
    sources: dict[str, Any] = {"result": results, "argument": arguments, "further": further}
    for node, (kind, number, slices) in zip(head.find_nodes(op="placeholder"), tail.wires, strict=True):
        if kind == "further" and number not in further:
            further[number] = _further(graph, "tail")
        source = sources[kind][number]
        for where in slices:
            source = graph.call_function(aten.slice.Tensor, (source, *where))
        copies[node] = source
    outputs = graph.graph_copy(head, copies)
    return list(sequence_of(outputs))


def _further(graph: fx.Graph, name: str) -> fx.Node:
    """One more argument behind all others."""
    placeholders = graph.find_nodes(op="placeholder")
    with graph.inserting_after(placeholders[-1] if placeholders else graph._root):
        return graph.placeholder(f"{name}_{len(placeholders)}")


def _tidied(module: fx.GraphModule, calls: Sequence[fx.Node]) -> bool:
    """Drop results that no call reads, and arguments that the structure does not; whether there were any."""
    graph = module.graph
    for item in [item for call in calls for item in call.users if not item.users]:
        item.graph.erase_node(item)
    read = sorted({integer_of(item.args[1]) for call in calls for item in call.users})
    results, output = _results(graph), graph.output_node()
    if len(read) < len(results):
        output.args = (tuple(results[k] for k in read),)
        for item in [item for call in calls for item in call.users]:
            item.args = (item.args[0], read.index(integer_of(item.args[1])))
        for leaf in results:
            if isinstance(leaf, fx.Node) and leaf.op == "call_function":
                erase_unread(leaf)
    placeholders = graph.find_nodes(op="placeholder")
    kept = [k for k, node in enumerate(placeholders) if node.users]
    for node in placeholders:
        if not node.users:
            graph.erase_node(node)
    for call in calls:
        call.args = tuple(call.args[k] for k in kept)
    module.recompile()
    return len(read) < len(results) or len(kept) < len(placeholders)


def _results(graph: fx.Graph) -> list[Any]:
    return list(sequence_of(graph.output_node().args[0]))


def _free(name: str, taken: Mapping[str, Any]) -> str:
    names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(1)))
    return next(each for each in names if each not in taken)
