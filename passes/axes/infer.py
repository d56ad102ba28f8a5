"""Axis inference: gives every dim of every tensor of a captured program its meaning."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from xdit_compile.errors import one_line
from xdit_compile.ir.arguments import integer_of, node_of, overload_of
from xdit_compile.ir.axes import Axis, AxisSystem, Concat, Product, resolve
from xdit_compile.ir.program import Program

from .rule import OpAxes, Rule, RuleBook, operator_name, tensor_operands, type_opaquely, values

Axes = list[Axis]
MOST_FOLDED = 65_536
"""Constants of at most this many elements are followed through the graph."""


@dataclasses.dataclass
class Frame:
    """One call of a structure, typed by itself: equal structures may mean different things."""

    call: fx.Node
    graph: fx.Graph
    axes: dict[fx.Node, list[Axes]]
    op_axes: dict[fx.Node, OpAxes]
    tables: set[fx.Node]
    constants: dict[fx.Node, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a call: its axes, whether it depends on no input of the user, its value where that is known."""

    axes: Axes
    table: bool
    value: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Place:
    """A node inside a call, as a reader would name it."""

    path: str
    node: str
    target: str
    repeated: bool

    def __str__(self) -> str:
        return f"{self.path or 'outside the blocks'}: {self.node} ({self.target})"


@dataclasses.dataclass
class Inference:
    """The axes of a program: those of the root's nodes, and a frame per call."""

    program: Program
    axes: dict[fx.Node, list[Axes]]
    frames: list[Frame]

    def nodes(self) -> Iterator[tuple[Frame, fx.Node, OpAxes]]:
        """Every typed node with its frame and its axes, in the order they run: those of a structure once a call."""
        for frame in self.frames:
            for node, op_axes in frame.op_axes.items():
                yield frame, node, op_axes

    def place(self, frame: Frame, node: fx.Node) -> Place:
        """Where a node of a frame stands."""
        target = operator_name(node.target) if isinstance(node.target, torch._ops.OpOverload) else str(node.target)
        return Place(frame.call.meta.get("path", ""), node.name, target, bool(frame.call.meta.get("repeated")))


def infer(program: Program, book: RuleBook) -> Inference:
    """Type every node of ``program``.

    A rule that refuses leaves a boundary and fresh axes, never an error.

    Args:
        book: the rules; what it has none for is typed opaquely.

    Returns:
        One axis for every dim of every value. Equal axes are one object.
    """
    system = AxisSystem()
    axes: dict[fx.Node, list[Axes]] = {}
    frames = []
    inputs = {spec.name: spec for spec in program.inputs}
    tables: set[fx.Node] = set()
    constants: dict[fx.Node, torch.Tensor] = {}
    for node in program.root.graph.nodes:
        if node.op == "placeholder":
            axes[node] = _fresh(node, system)
            if inputs[node.name].kind != "user":
                tables.add(node)
            if inputs[node.name].kind == "constant":
                constants[node] = program.constants[str(inputs[node.name].target)]
        elif node.op == "call_module":
            graph = getattr(program.root, str(node.target)).graph
            arguments = [Argument(_of(axes, arg), arg in tables, constants.get(arg)) for arg in node.args]
            frame = _frame(node, graph, arguments, system, book)
            frames.append(frame)
            axes[node] = [_of(frame.axes, leaf) for leaf in results_of(graph)]
        elif node.op == "call_function" and node.target is operator.getitem:
            source, position = node.args
            axes[node] = [axes[source][position]]
            frame = next(each for each in reversed(frames) if each.call is source)
            if results_of(frame.graph)[position] in frame.tables:
                tables.add(node)
    _freeze(axes, frames)
    return Inference(program, axes, frames)


def _of(axes: dict[fx.Node, list[Axes]], node: object) -> Axes:
    return axes[node][0] if isinstance(node, fx.Node) else []


def results_of(graph: fx.Graph) -> Sequence[object]:
    """The leaves of a graph's output: nodes, or values that no node makes."""
    (result,) = next(node for node in reversed(graph.nodes) if node.op == "output").args
    return result if isinstance(result, tuple | list) else (result,)


def _fresh(node: fx.Node, system: AxisSystem) -> list[Axes]:
    return [[system.atom(size) for size in value.shape] for value in values(node)]


def _frame(call: fx.Node, graph: fx.Graph, arguments: list[Argument], system: AxisSystem, book: RuleBook) -> Frame:
    frame = Frame(call, graph, {}, {}, set(), {})
    remaining = iter(arguments)
    for node in graph.nodes:
        if node.op == "placeholder":
            argument = next(remaining)
            frame.axes[node] = [argument.axes]
            if argument.table:
                frame.tables.add(node)
            if argument.value is not None:
                frame.constants[node] = argument.value
        elif node.op == "get_attr":
            frame.axes[node] = _fresh(node, system)
            frame.tables.add(node)
        elif node.op == "call_function":
            _type_call(node, frame, system, book)
    return frame


def _type_call(node: fx.Node, frame: Frame, system: AxisSystem, book: RuleBook) -> None:
    operands = tensor_operands(node)
    if all(operand in frame.tables for operand in operands):
        frame.tables.add(node)
    if node.target is operator.getitem:
        frame.axes[node] = [frame.axes[node_of(node.args[0])][integer_of(node.args[1])]]
        return
    op_axes = _typed(node, frame, operands, system, book)
    _fold(node, frame, operands)
    frame.op_axes[node] = op_axes
    frame.axes[node] = op_axes.result_axes


def _fold(node: fx.Node, frame: Frame, operands: list[fx.Node]) -> None:
    """Compute small values made of known constants: index lists are read by rules."""
    small = all(value.numel() <= MOST_FOLDED for value in values(node))
    if operands and small and all(operand in frame.constants for operand in operands):
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), frame.constants.__getitem__)
        folded = overload_of(node)(*args, **kwargs)
        if isinstance(folded, torch.Tensor):
            frame.constants[node] = folded


def _typed(node: fx.Node, frame: Frame, operands: list[fx.Node], system: AxisSystem, book: RuleBook) -> OpAxes:
    def workbench() -> Rule:
        return Rule(node, [frame.axes[operand][0] for operand in operands], system, frame.tables, frame.constants)

    rule_function, rule, mark = book.find(node.target), workbench(), system.mark()
    if rule_function is None:
        type_opaquely(rule, f"no rule for {node.target}")
        return rule.op_axes()
    try:
        rule_function(rule)
    except Exception as error:
        system.rollback(mark)
        rule = workbench()
        rule.unread = f"{node.target} has arguments that its rule cannot read: {one_line(error)}"
        type_opaquely(rule, rule.unread)
    return rule.op_axes()


class _Interner:
    """Makes equal axes one object, so that later passes can remember what they know by identity."""

    def __init__(self) -> None:
        self._known: dict[tuple, Axis] = {}

    def __call__(self, axis: Axis) -> Axis:
        return self._intern(resolve(axis))

    def _intern(self, axis: Axis) -> Axis:
        children = getattr(axis, "factors", None) or getattr(axis, "parts", None)
        if children is None:
            return axis
        inner = tuple(self._intern(child) for child in children)
        kind = Product if isinstance(axis, Product) else Concat
        return self._known.setdefault((kind, *map(id, inner)), kind(inner))


def _freeze(axes: dict[fx.Node, list[Axes]], frames: list[Frame]) -> None:
    intern = _Interner()

    def frozen(groups: list[Axes]) -> list[Axes]:
        return [[intern(axis) for axis in group] for group in groups]

    for table in [axes, *(frame.axes for frame in frames)]:
        for node in table:
            table[node] = frozen(table[node])
    for frame in frames:
        for op_axes in frame.op_axes.values():
            op_axes.operand_axes, op_axes.result_axes = frozen(op_axes.operand_axes), frozen(op_axes.result_axes)
            (op_axes.kept,) = frozen([op_axes.kept])
