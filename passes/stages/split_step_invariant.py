"""Takes what stays the same out of the calls of a program that depend on inputs which change."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection
from typing import Any

from torch import fx

from xdit_compile.ir.program import Program
from xdit_compile.ir.subgraph import reached, subgraph


def separate(program: Program, varying: Collection[str]) -> Program:
    """The program with every call between repeated blocks made two: one of what depends on no input in ``varying``.

    What a capture records between blocks is one graph, the embedding of a time step and that of the picture together.
    Repeated blocks stay as they are.
    """
    return _Separator(program, varying).run()


class _Separator:
    def __init__(self, program: Program, varying: Collection[str]):
        self.program, self.varying = program, varying
        self.graph = fx.Graph()
        self.modules: dict[str, fx.GraphModule] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.varies: set[fx.Node] = set()

    def run(self) -> Program:
        for node in self.program.root.graph.nodes:
            if node in self.copies:
                continue
            if node.name in self.varying if node.op == "placeholder" else self._depends(node):
                self.varies.add(node)
            structure = getattr(self.program.root, str(node.target)) if node.op == "call_module" else None
            if structure is not None and node in self.varies and not node.meta.get("repeated"):
                self._split(node, structure)
            else:
                if structure is not None:
                    self.modules[str(node.target)] = structure
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        root = fx.GraphModule(dict(self.modules), self.graph)
        return dataclasses.replace(self.program, root=root)

    def _depends(self, node: fx.Node) -> bool:
        return any(each in self.varies for each in node.all_input_nodes)

    def _split(self, call: fx.Node, structure: fx.GraphModule) -> None:
        formals = structure.graph.find_nodes(op="placeholder")
        actuals = dict(zip(formals, call.args, strict=True))
        fixed, changing = _sorted(structure.graph, {formal for formal in formals if actuals[formal] in self.varies})
        results: Any = structure.graph.output_node().args[0]
        users: dict[Any, fx.Node] = {user.args[1]: user for user in call.users}
        asked = [results[k] for k in users]
        read = {node for each in changing for node in each.all_input_nodes}
        between = [node for node in fixed if node in asked or node in read]
        values = {formal: self.copies[actual] for formal, actual in actuals.items() if isinstance(actual, fx.Node)}
        if between:
            values |= self._call(f"{call.target}_{call.name}_fixed", structure, between, values, call)
        rest = [node for node in dict.fromkeys(asked) if node not in values]
        values |= self._call(f"{call.target}_{call.name}", structure, rest, values, call)
        for k, item in users.items():
            self.copies[item] = values[results[k]]
            if results[k] in changing:
                self.varies.add(item)

    def _call(
        self,
        name: str,
        structure: fx.GraphModule,
        results: list[fx.Node],
        values: dict[fx.Node, fx.Node],
        call: fx.Node,
    ) -> dict[fx.Node, fx.Node]:  # fmt: skip
        """One more call, of what it takes to make ``results`` of a structure from ``values``."""
        nodes = reached(results, lambda node: node not in values)
        taken = [node for node in values if any(user in nodes for user in node.users) or node in results]
        copied = [node for node in structure.graph.nodes if node in nodes]
        graph = subgraph({node: node.name for node in taken}, copied, results)
        self.modules[name] = fx.GraphModule(structure, graph)
        made = self.graph.call_module(name, tuple(values[node] for node in taken))
        made.meta.update(call.meta, val=tuple(node.meta["val"] for node in results))
        items = {}
        for k, node in enumerate(results):
            items[node] = self.graph.call_function(operator.getitem, (made, k))
            items[node].meta["val"] = node.meta["val"]
        return items


def _sorted(graph: fx.Graph, formals: set[fx.Node]) -> tuple[dict[fx.Node, None], set[fx.Node]]:
    """The operators that depend on other inputs alone, and those that depend on these; a constant is neither."""
    changing = set(formals)
    fixed: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if any(each in changing for each in node.all_input_nodes):
            changing.add(node)
        elif any(each.op == "placeholder" or each in fixed for each in node.all_input_nodes):
            fixed[node] = None
    return fixed, changing
