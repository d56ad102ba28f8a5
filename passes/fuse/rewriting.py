"""Passes that rewrite what happens inside of structures, whoever calls them, and say what they did."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx

from xdit_compile.capture.simplify import erase_with_sources
from xdit_compile.ir.program import Program
from xdit_compile.passes.memory.on_meta import Shapes, shapes_of

from .selection import Chooser, Found


def put_in_place(node: fx.Node, operator: Any, arguments: tuple[Any, ...]) -> None:
    """Have an operator compute what a node did, which goes, with what nobody else reads."""
    with node.graph.inserting_before(node):
        node.replace_all_uses_with(node.graph.call_function(operator, arguments))
    erase_with_sources(node)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A pass over structures.

    Args:
        name: of the pass.
        what: what it changes, in the plural.
        rewrite: changes a graph in place, of whose nodes it is told what they yield, at the sites that are chosen.
    """

    name: str
    what: str
    rewrite: Callable[[fx.Graph, Shapes, Chooser], Found]

    def __call__(self, program: Program, chooser: Chooser | None = None) -> Program:
        """The same program, rewritten."""
        return self._run(program, chooser)[0]

    def told(self, program: Program, chooser: Chooser | None = None) -> str:
        """What the pass does to one call of the module, what that was chosen by, and what it leaves."""
        result = self._run(program, chooser)[1]
        return f"{self.name}: {result.changed} {self.what}{result}"

    def _run(self, program: Program, chooser: Chooser | None) -> tuple[Program, Found]:
        chooser = Chooser(self.name) if chooser is None else chooser
        modules = {
            name: fx.GraphModule(structure, copy.deepcopy(structure.graph))
            for name, structure in program.structures().items()
        }
        copied = dataclasses.replace(program, root=fx.GraphModule(modules, copy.deepcopy(program.root.graph)))
        shapes, total = shapes_of(copied), Found()
        calls = Counter(str(call.target) for call in program.calls())
        for name, module in modules.items():
            total.add(self.rewrite(module.graph, shapes, chooser), calls[name])
            module.graph.lint()
            module.recompile()
        root = fx.GraphModule({**modules}, copied.root.graph)
        return (dataclasses.replace(program, root=root) if total.changed else program), total
