"""Takes linears of few rows out of blocks, where blocks compute them of values that all of them are given alike.

Modulations are such: every block has a linear of its own of the embedding of the time step. Computed before the blocks,
all together, they are one product of one value (`join_linears`), of which ranks that share the tokens can each take
some columns (`passes.lowering.small_linear`): loop-invariant code motion, where the loop is the list of blocks.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from xdit_compile.capture.simplify import erase_with_sources
from xdit_compile.ir.arguments import node_of, sequence_of
from xdit_compile.ir.program import Program
from xdit_compile.ir.subgraph import placeholders_first, reached
from xdit_compile.passes.lowering.small_linear import has_few_rows

from .equal_values import is_pure

NAME = "hoisted_linears"
"""What the structures are called that compute them."""


@dataclasses.dataclass(frozen=True)
class _Hoistable:
    """A linear in a structure.

    Args:
        linear: the node.
        values: of the root that it depends on.
    """

    linear: fx.Node
    values: frozenset[fx.Node]


def hoist_linears(program: Program) -> Program:
    """The same program with one call before the blocks for all linears of few rows of the same shared values.

    A value of the root is shared where several calls are given it. A linear leaves its structure where it depends on
    shared values and weights alone, and every call of the structure is given the same ones.
    """
    return _Root(program).run()


def told(program: Program) -> str:
    """What the pass did to one call of the module."""
    counts = [len(sequence_of(each.graph.output_node().args[0])) for each in _made(program)]
    return f"hoist_linears: {sum(counts)} linears of few rows before the blocks in {len(counts)} calls"


def _made(program: Program) -> Iterable[fx.GraphModule]:
    return (each for name, each in program.structures().items() if name.startswith(NAME))


class _Root:
    """The root graph of a program while linears are brought there."""

    def __init__(self, program: Program):
        self._program = program
        self._graph = copy.deepcopy(program.root.graph)
        self._modules: dict[str, fx.GraphModule] = dict(program.structures())
        self._calls: dict[str, list[fx.Node]] = {}
        for call in self._graph.find_nodes(op="call_module"):
            self._calls.setdefault(str(call.target), []).append(call)
        kinds = {spec.name: spec.kind for spec in program.inputs}
        self._tables = {
            node for node in self._graph.find_nodes(op="placeholder") if kinds[node.name] in ("parameter", "buffer")
        }
        given = Counter(node for calls in self._calls.values() for call in calls for node in call.all_input_nodes)
        self._shared = {node for node, count in given.items() if count > 1 and node not in self._tables}

    def run(self) -> Program:
        by_values: dict[frozenset[fx.Node], list[tuple[str, fx.Node]]] = {}
        for name, structure in self._modules.items():
            for each in self._hoistable(name, structure):
                by_values.setdefault(each.values, []).append((name, each.linear))
        by_values = {
            values: some for values, some in by_values.items() if sum(len(self._calls[name]) for name, _ in some) > 1
        }
        if not by_values:
            return self._program
        taken: dict[str, list[tuple[fx.Node, list[fx.Node]]]] = {}
        for number, (values, some) in enumerate(by_values.items()):
            for (name, linear), results in zip(some, self._hoist(number, values, some), strict=True):
                taken.setdefault(name, []).append((linear, results))
        for name, linears in taken.items():
            self._modules[name] = self._without(self._modules[name], linears, self._calls[name])
        self._graph.lint()
        return dataclasses.replace(self._program, root=fx.GraphModule(self._modules, self._graph))

    def _hoistable(self, name: str, structure: fx.GraphModule) -> list[_Hoistable]:
        """The linears of a structure that can leave it, and of which something there needs the result."""
        sources: dict[fx.Node, frozenset[fx.Node]] = {}
        linears: list[fx.Node] = []
        for node in structure.graph.nodes:
            known = self._of_argument(name, structure, node) if node.op == "placeholder" else _of(node, sources)
            if known is not None:
                sources[node] = known
                if has_few_rows(node) and sources[node_of(node.args[0])]:
                    linears.append(node)
        inside = reached(linears, lambda node: node.op == "call_function")
        return [_Hoistable(each, sources[each]) for each in linears if not inside.issuperset(each.users)]

    def _of_argument(self, name: str, structure: fx.GraphModule, formal: fx.Node) -> frozenset[fx.Node] | None:
        """The shared value that all calls give for an argument; none for a weight, None for anything else."""
        position = structure.graph.find_nodes(op="placeholder").index(formal)
        actuals = {call.args[position] for call in self._calls[name]}
        if actuals <= self._tables:
            return frozenset()
        return frozenset(map(node_of, actuals)) if len(actuals) == 1 and actuals <= self._shared else None

    def _hoist(
        self, number: int, values: frozenset[fx.Node], some: Sequence[tuple[str, fx.Node]]
    ) -> list[list[fx.Node]]:
        """One call that computes linears of the same values.

        Returns:
            For each linear its results, one for each call of its structure.
        """
        builder = _Builder()
        for name, linear in some:
            for call in self._calls[name]:
                builder.add(linear, _actuals(self._modules[name], call))
        module, arguments, positions = builder.finish()
        target = self._free_name(number)
        self._modules[target] = module
        last = max((*values, *self._graph.find_nodes(op="placeholder")))
        while last.next.target is operator.getitem:
            last = last.next
        with self._graph.inserting_after(last):
            made = self._graph.create_node("call_module", target, tuple(arguments))
        made.meta.update(path="", repeated=False)
        results = sequence_of(module.graph.output_node().args[0])
        with self._graph.inserting_after(made):
            items = [self._graph.call_function(operator.getitem, (made, k)) for k in reversed(range(len(results)))]
        items.reverse()
        for item, result in zip(items, results, strict=True):
            item.meta["val"] = result.meta["val"]
        each = iter(positions)
        return [[items[next(each)] for _ in self._calls[name]] for name, _ in some]

    def _free_name(self, number: int) -> str:
        names = (f"{NAME}_{k}" for k in itertools.count(number))
        return next(name for name in names if name not in self._modules)

    def _without(
        self, structure: fx.GraphModule, linears: Sequence[tuple[fx.Node, list[fx.Node]]], calls: Sequence[fx.Node]
    ) -> fx.GraphModule:
        """A structure that is given the results of linears, and its calls with what it takes then."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(structure.graph, copies, return_output_node=True)
        assert isinstance(result, tuple)
        graph.output(result[0])
        placeholders = placeholders_first(graph)
        read = [bool(node.users) for node in placeholders]
        for number, (linear, results) in enumerate(linears):
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                node = graph.placeholder(f"{NAME}_{number}")
            node.meta["val"] = linear.meta["val"]
            copies[linear].replace_all_uses_with(node)
            for call, item in zip(calls, results, strict=True):
                call.args = (*call.args, item)
        for linear, _ in linears:
            erase_with_sources(copies[linear])
        gone = {position for position, node in enumerate(placeholders) if read[position] and not node.users}
        for position in gone:
            graph.erase_node(placeholders[position])
        for call in calls:
            call.args = tuple(each for position, each in enumerate(call.args) if position not in gone)
        graph.lint()
        return fx.GraphModule(structure, graph)


def _of(node: fx.Node, sources: Mapping[fx.Node, frozenset[fx.Node]]) -> frozenset[fx.Node] | None:
    """The shared values that a node is made of; None where it is made of anything else."""
    operands = node.all_input_nodes
    if not operands or not is_pure(node) or not all(operand in sources for operand in operands):
        return None
    return frozenset[fx.Node]().union(*(sources[operand] for operand in operands))


def _actuals(structure: fx.GraphModule, call: fx.Node) -> dict[fx.Node, Any]:
    return dict(zip(structure.graph.find_nodes(op="placeholder"), call.args, strict=True))


class _Builder:
    """A structure as it grows out of linears of other ones, with what they are made of; what is equal is made once."""

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self._arguments: dict[fx.Node, fx.Node] = {}
        self._known: dict[Any, fx.Node] = {}
        self._results: dict[fx.Node, int] = {}
        self._positions: list[int] = []

    def add(self, linear: fx.Node, actuals: Mapping[fx.Node, fx.Node]) -> None:
        """Compute a linear of what a call of its structure is given."""
        nodes = reached([linear], lambda node: True)
        copies: dict[fx.Node, fx.Node] = {}
        for node in (node for node in linear.graph.nodes if node in nodes):
            copies[node] = self._argument(node, actuals[node]) if node in actuals else self._copied(node, copies)
        self._positions.append(self._results.setdefault(copies[linear], len(self._results)))

    def finish(self) -> tuple[fx.GraphModule, list[fx.Node], list[int]]:
        """The structure, what the root gives it, and which of its results each linear is."""
        placeholders_first(self._graph)
        self._graph.output(tuple(self._results))
        self._graph.lint()
        return fx.GraphModule({}, self._graph), list(self._arguments), self._positions

    def _argument(self, formal: fx.Node, actual: fx.Node) -> fx.Node:
        if actual not in self._arguments:
            self._arguments[actual] = self._graph.placeholder(actual.name)
            self._arguments[actual].meta["val"] = formal.meta["val"]
        return self._arguments[actual]

    def _copied(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
        key = (node.target, str(args), str(kwargs))
        if key not in self._known:
            self._known[key] = self._graph.node_copy(node, copies.__getitem__)
        return self._known[key]
