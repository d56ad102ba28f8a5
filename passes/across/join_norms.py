"""Moves the norms at the begin of a block, with their modulation, to the end of the block before: the loop is rotated.

There they follow the gated sum that makes the hidden states, and one kernel computes all of it, as it does inside of a
block: a launch less, and hidden states are read once less. Nodes are moved and none is changed. Blocks stay one
structure, with the norms of the next one behind them, but for the last of a kind, which something else follows.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.ir.arguments import integer_of, node_of, sequence_of
from xdit_compile.ir.program import Program
from xdit_compile.passes.memory.on_meta import Shapes, shapes_of

from .heads import Head, heads_of, is_arithmetic, is_view
from .rotation import Rotation, Tail, Wire

UNMADE = "no call before makes what it reads"
COMPUTED = "the root graph computes what it reads"
UNFUSED = "no arithmetic makes what it reads"
STRUCTURES = "there would be more structures to compile for fewer launches saved"
STATE = "what stays from call to call, or comes in patches, is computed block by block"
KEPT = ("patch", "shared", "state", "incoming")
"""Kinds of inputs of programs that compute patches, or on what the call before left."""


def join_norms(program: Program) -> Program:
    """The same program with norms at the end of the call that makes what they read, where arithmetic makes it.

    A head stays in its structure where no call saves a launch by it, or where that takes more structures than it saves
    launches; the head of a structure that is called once where it takes any. Programs of patches and of states that
    stay from call to call stay as they are.
    """
    root = _Root(program)
    return root.rotated() if root.tails else program


def told(program: Program) -> str:
    """What is moved in one call of the module, how many structures there are then, and why other norms stay."""
    root = _Root(program)
    if root.refused is not None:
        return f"join_norms: left out, as {root.refused}"
    before, after = (len(each.structures()) for each in (program, root.rotated() if root.tails else program))
    apart = "".join(f"; {count} apart, as {reason}" for reason, count in root.apart.most_common() if count)
    norms = sum(tail.head.norms for tail in root.saving)
    return (
        f"join_norms: {norms} norms in the kernel that makes what they read, {after} structures, {before} before{apart}"
    )


class _Root:
    """Which heads leave the structures of a program, and what computes them.

    Attributes:
        tails: these, each with the call that computes it; None where that is a call of its own.
        saving: those by which a launch is saved.
        apart: why other norms stay where they are, and how many.
        refused: why all do.
    """

    def __init__(self, program: Program):
        self._program = program
        self._graph = copy.deepcopy(program.root.graph)
        self._order = {node: number for number, node in enumerate(self._graph.nodes)}
        self._calls: dict[str, list[fx.Node]] = {name: [] for name in program.structures()}
        for call in self._graph.find_nodes(op="call_module"):
            self._calls[str(call.target)].append(call)
        self._heads: dict[str, list[Head]] = {}
        self.tails: list[tuple[fx.Node | None, Tail]] = []
        self.saving: list[Tail] = []
        self.apart = Counter[str]()
        self.refused = STATE if any(spec.kind in KEPT for spec in program.inputs) else None
        if self.refused is None:
            self._choose()

    def rotated(self) -> Program:
        """The program with the heads where they are computed then."""
        leaving: dict[str, dict[int, Head]] = {}
        behind: dict[fx.Node, list[Tail]] = {}
        for before, tail in self.tails:
            leaving.setdefault(str(tail.call.target), {})[tail.number] = tail.head
            if before is not None:
                behind.setdefault(before, []).append(tail)
        alone = [tail for before, tail in self.tails if before is None]
        shapes = shapes_of(self._program)
        modules: dict[str, Any] = dict(self._program.structures())
        root = fx.GraphModule(modules, self._graph)
        root = Rotation(root, leaving, behind, alone, self._rows(shapes), shapes).run()
        return dataclasses.replace(self._program, root=root)

    def _rows(self, shapes: Shapes) -> dict[str, set[int]]:
        """Results that norms reduce and that are none of the root's, of structures that are called once, whose rows do
        not lie in one piece.

        Kernels would go over such a value twice, and all blocks behind would be compiled for it, too.
        """
        rows: dict[str, set[int]] = {}
        for _, tail in self.tails:
            for value, reduced in zip(tail.values, tail.head.reduced, strict=True):
                inside = (
                    reduced
                    and value.target is operator.getitem
                    and not any(each.op == "output" for each in value.users)
                )
                call = value.args[0] if inside else None
                if isinstance(call, fx.Node) and len(self._calls[str(call.target)]) == 1:
                    number = integer_of(value.args[1])
                    leaf = shapes.get(self._results(call)[number])
                    if leaf is not None and leaf.dim() and leaf.shape[-1] > 1 and leaf.stride()[-1] != 1:
                        rows.setdefault(str(call.target), set()).add(number)
        return rows

    def _choose(self) -> None:
        """First structures of several calls: once equal ones differ by what follows, a further head takes no more."""
        for name, structure in self._program.structures().items():
            self._heads[name], apart = heads_of(structure)
            self.apart.update({reason: count * len(self._calls[name]) for reason, count in apart.items()})
        for name in sorted(self._heads, key=lambda name: len(self._calls[name]) == 1):
            chosen = [each for number in range(len(self._heads[name])) for each in self._placed(name, number)]
            saving = [tail for _, tail, saves in chosen if saves]
            tails = [(before, tail) for before, tail, _ in chosen]
            more = self._count([*self.tails, *tails]) - self._count(self.tails)
            if more <= (len(saving) if len(self._calls[name]) > 1 else 0):
                self.tails += tails
                self.saving += saving
            else:
                self.apart[STRUCTURES] += sum(tail.head.norms for _, tail in tails)

    def _placed(self, name: str, number: int) -> list[tuple[fx.Node | None, Tail, bool]]:
        """What computes a head for each call of its structure, and whether that saves a launch; none where none does.

        A call of its own computes it where another would be one more structure for nothing.
        """
        head, reasons = self._heads[name][number], list[str]()
        placed = list[tuple[fx.Node | None, Tail, bool]]()
        for call in self._calls[name]:
            values = tuple(node_of(call.args[position]) for position in head.positions)
            before, wires, reason = self._wired(values)
            if before is not None and reason is None:
                reason = self._unfused(before, head, wires)
                if reason is not None and len(self._calls[str(before.target)]) > 1:
                    before = None
            placed.append((before, Tail(call, number, head, wires, values), reason is None))
            reasons += [] if reason is None else [reason]
        if len(reasons) < len(placed):
            return placed
        for reason in reasons:
            self.apart[reason] += head.norms
        return []

    def _wired(self, values: Sequence[fx.Node]) -> tuple[fx.Node | None, tuple[Wire, ...], str | None]:
        """The last call behind values, and where it has each; why there is none instead."""
        makers = [_makers(value) for value in values]
        before = max((call for calls in makers for call in calls), key=self._order.__getitem__, default=None)
        if before is None:
            return None, (), UNMADE
        wires, further = list[Wire](), list[fx.Node]()
        for value, calls in zip(values, makers, strict=True):
            if before in calls:
                whole, slices = _whole(value)
                if whole.target is not operator.getitem or whole.args[0] is not before:
                    return None, (), COMPUTED
                wires.append(("result", integer_of(whole.args[1]), slices))
            elif value in before.args:
                wires.append(("argument", before.args.index(value), ()))
            else:
                further += [] if value in further else [value]
                wires.append(("further", further.index(value), ()))
        return before, tuple(wires), None

    def _unfused(self, before: fx.Node, head: Head, wires: Sequence[Wire]) -> str | None:
        """Why no kernel of a call would compute a head with what it reads; None where one does."""
        results = self._results(before)
        for (kind, number, _), reduced in zip(wires, head.reduced, strict=True):
            node = results[number] if kind == "result" and reduced else None
            while isinstance(node, fx.Node) and is_view(node):
                node = node.args[0]
            if isinstance(node, fx.Node) and is_arithmetic(node):
                return None
        return UNFUSED

    def _results(self, call: fx.Node) -> Sequence[Any]:
        return sequence_of(self._program.structures()[str(call.target)].graph.output_node().args[0])

    def _count(self, tails: Sequence[tuple[fx.Node | None, Tail]]) -> int:
        """How many structures there are with some tails."""
        forms: dict[fx.Node | None, list[Any]] = {}
        for before, tail in tails:
            forms.setdefault(before, []).append(tail.form)
        computing = {(str(call.target), *forms.get(call, ())) for calls in self._calls.values() for call in calls}
        return len(computing) + len({tail.head.digest for before, tail in tails if before is None})


def _whole(value: fx.Node) -> tuple[fx.Node, tuple[tuple[Any, ...], ...]]:
    """What the root takes slices of for a value, and the slices, in order."""
    slices = list[tuple[Any, ...]]()
    while value.target is torch.ops.aten.slice.Tensor:
        slices.insert(0, value.args[1:])
        value = node_of(value.args[0])
    return value, tuple(slices)


def _makers(value: fx.Node) -> set[fx.Node]:
    """The calls that a value of the root is made of."""
    if value.op == "call_module":
        return {value}
    return set[fx.Node]().union(*(_makers(each) for each in value.all_input_nodes))
