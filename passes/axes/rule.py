"""What one operator says about axes: its loops, what they make of its dims, and the registry of rules that make one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile.ir.arguments import overload_of
from xdit_compile.ir.axes import Axis, AxisSystem, Conflict

from .local_call import Emit
from .operators import Operator
from .windows import Windows

Kind = Literal["map", "copies", "sum", "mean", "whole", "halo", "stats", "keys"]


@dataclasses.dataclass(frozen=True)
class Loop:
    """One index that an operator runs over, and where it stands in operands and results.

    ``kind``: ``map`` (each position by itself), ``copies`` (all are the only one), ``sum`` and ``mean`` (contracted
    linearly), ``whole`` (needs every position), ``halo`` (needs neighbours), ``stats`` (normalised over), ``keys``
    (attended over).
    ``args`` and ``outs`` are ``(operand or result, dim)`` pairs; several dims of one operand mean a regrouping.
    """

    kind: Kind
    args: tuple[tuple[int, int], ...]
    outs: tuple[tuple[int, int], ...]

    def dims_of(self, operand: int) -> list[int]:
        """The dims of an operand on which the loop stands."""
        return [dim for other, dim in self.args if other == operand]


@dataclasses.dataclass(frozen=True)
class Boundary:
    """A dim on which an operator could not be understood; it is gathered there when it is split."""

    operand: int
    dim: int
    reason: str


@dataclasses.dataclass
class OpAxes:
    """The axes of one node: what its operands bring, what it expects of them, what it yields, and its loops.

    Args:
        emit: how one rank calls it; as it was called where that is None.
        bias: the operand that is added once after a sum over ranks.
        operator: what a lowering must know of it.
        windows: for dims of the first operand of which every row of the result reads a window of rows.
        cut: ``(dim, start, length)`` of an operator that turned out to cut a run of positions out.
        unread: why its rule could not read its arguments.
        kept: axes of which ``emit`` asks the length on a rank.
        ignored: operands of which only dtype and device matter.
    """

    operands: list[fx.Node]
    operand_axes: list[list[Axis]]
    result_axes: list[list[Axis]]
    loops: list[Loop]
    boundaries: list[Boundary]
    emit: Emit | None = None
    bias: int | None = None
    operator: Operator | None = None
    windows: Mapping[int, Windows] = dataclasses.field(default_factory=dict)
    cut: tuple[int, int, int] | None = None
    unread: str | None = None
    kept: list[Axis] = dataclasses.field(default_factory=list)
    ignored: set[int] = dataclasses.field(default_factory=set)

    def read(self) -> list[int]:
        """Operands whose values matter."""
        return [operand for operand in range(len(self.operands)) if operand not in self.ignored]


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, in order, repetitions kept."""
    return [leaf for leaf in pytree.arg_tree_leaves(*node.args, **node.kwargs) if isinstance(leaf, fx.Node)]


def values(node: fx.Node) -> list[torch.Tensor]:
    """The tensors a node yields."""
    val = node.meta["val"]
    return [v for v in (val if isinstance(val, tuple | list) else [val]) if isinstance(v, torch.Tensor)]


class Rule:
    """The workbench on which a rule types one node.

    A dim is told as ``(operand, dim)`` or ``(result, dim)``, counted from the front.

    Args:
        actual: the axes that each operand brings, by dim.
        tables: nodes of the graph that depend on no input of the user.
        constants: nodes whose values are the same in every call, where they are known.
    """

    def __init__(
        self,
        node: fx.Node,
        actual: Sequence[Sequence[Axis]],
        system: AxisSystem,
        tables: Collection[fx.Node] = (),
        constants: Mapping[fx.Node, torch.Tensor] | None = None,
    ):
        self.node = node
        self.system = system
        self._tables = tables
        self._constants = constants or {}
        self.operands = tensor_operands(node)
        self.actual = [list(axes) for axes in actual]
        self.operand_axes = [list(axes) for axes in actual]
        self.result_axes: list[list[Axis | None]] = [[None] * value.dim() for value in values(node)]
        self.loops: list[Loop] = []
        self.boundaries: list[Boundary] = []
        self.emit: Emit | None = None
        self.bias: int | None = None
        self.operator: Operator | None = None
        self.cut: tuple[int, int, int] | None = None
        self.unread: str | None = None
        self._windows: dict[int, Windows] = {}
        self._kept: list[Axis] = []
        self._ignored: set[int] = set()

    @property
    def args(self) -> tuple[Any, ...]:
        return self.node.args

    @property
    def name(self) -> str:
        """The operator's, without its overload."""
        return operator_name(overload_of(self.node))

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """The argument of the node at a position, or else of this name; ``default`` where it is not given."""
        return self.node.args[index] if index < len(self.node.args) else self.node.kwargs.get(name, default)

    def named(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema, wherever this overload has it; ``default`` where not."""
        names = [argument.name for argument in overload_of(self.node)._schema.arguments]
        return self.arg(names.index(name), name, default) if name in names else default

    def is_table(self, operand: int) -> bool:
        """Whether an operand depends on no input of the user: rows of a position table are not an axis of data."""
        return self.operands[operand] in self._tables

    def constant(self, operand: int) -> torch.Tensor | None:
        """The value of an operand that is the same in every call, where it is known."""
        value = self._constants.get(self.operands[operand])
        return None if value is None or value.is_meta else value

    def wrapped(self, dim: int) -> int:
        """A dim of the first operand counted from the front; a tensor without dims may be asked for its only one."""
        return dim % max(len(self.actual[0]), 1)

    def shape(self, operand: int) -> list[int]:
        """The shape of a whole operand."""
        return [axis.size for axis in self.actual[operand]]

    def out_shape(self, result: int = 0) -> list[int]:
        """The shape of a whole result."""
        return list(values(self.node)[result].shape)

    def merge(self, pairs: Iterable[tuple[int, int]], axis: Axis | None = None) -> Axis:
        """Unify the axes of some dims of operands, and ``axis`` with them where it is given.

        A dim that refuses becomes a boundary and expects the axis of the others.

        Args:
            pairs: each an operand and a dim; at least one where there is no ``axis``.

        Returns:
            The axis that all these dims are expected to have.
        """
        for operand, dim in pairs:
            actual = self.actual[operand][dim]
            if axis is None:
                axis = actual
                continue
            try:
                self.system.unify(axis, actual)
            except Conflict as conflict:
                self.refuse(operand, dim, str(conflict))
            self.operand_axes[operand][dim] = axis
        assert axis is not None
        return axis

    def refuse(self, operand: int, dim: int, reason: str) -> None:
        """Record a boundary: a dim of which the operator could not be understood."""
        self.boundaries.append(Boundary(operand, dim, reason))

    def loop(
        self, kind: Kind, args: Iterable[tuple[int, int]], outs: Iterable[tuple[int, int]], axis: Axis | None = None
    ) -> None:
        """Record a loop whose operands' dims are made one axis, which its results carry.

        Args:
            args: the operands' dims on which it stands, by ``(operand, dim)``.
            outs: the results' dims on which it stands, by ``(result, dim)``.
            axis: one that they are all made. Without it and without ``args`` each dim of ``outs`` has a fresh one.
        """
        args, outs = tuple(args), tuple(outs)
        if args:
            axis = self.merge(args, axis)
        for result, dim in outs:
            self.result_axes[result][dim] = axis if axis is not None else self.system.atom(self.out_shape(result)[dim])
        self.loops.append(Loop(kind, args, outs))

    def look(self, dim: int, windows: Windows, made: Axis | None = None) -> None:
        """Record that each row of a dim of the result is made from a window of rows of that dim of the first operand.

        ``made`` is the axis of the result; without one it is an axis of its own.
        """
        self.result_axes[0][dim] = made if made is not None else self.system.atom(self.out_shape()[dim])
        self.loops.append(Loop("halo", ((0, dim),), ((0, dim),)))
        self._windows[dim] = windows

    def add_regrouping(self, in_dims: Sequence[int], out_dims: Sequence[int]) -> None:
        """Record that neighbouring dims of the first operand were laid out anew as dims of the first result.

        The rule has named the axes of these.
        """
        self.loops.append(Loop("map", tuple((0, dim) for dim in in_dims), tuple((0, dim) for dim in out_dims)))

    def add_copies(self, operand_dim: int, dim: int) -> None:
        """Record that all positions of a dim of the result are the one of ``operand_dim`` of the first operand."""
        self.loops.append(Loop("copies", ((0, operand_dim),), ((0, dim),)))

    def add_join(self, args: Sequence[tuple[int, int]], outs: Sequence[tuple[int, int]]) -> None:
        """Record a loop over dims that hold different parts of one axis; the rule has named the results' axes."""
        self.loops.append(Loop("map", tuple(args), tuple(outs)))

    def ignore(self, operand: int) -> None:
        """An operand of which only dtype and device matter: it may lie as it likes."""
        self._ignored.add(operand)

    def keep(self, axis: Axis | None) -> int | None:
        """Hold on to an axis of which the emission asks the local length.

        Returns:
            The handle by which `LocalCall.length` is asked for it; None for no axis.
        """
        if axis is None:
            return None
        self._kept.append(axis)
        return len(self._kept) - 1

    def opaque(self, operand: int, dim: int, reason: str) -> None:
        """A dim that must be whole because its meaning ends here."""
        self.refuse(operand, dim, reason)
        self.loops.append(Loop("whole", ((operand, dim),), ()))

    def op_axes(self) -> OpAxes:
        """What the rule has said of the node; dims of results that it has not named get fresh axes."""
        outs = [
            [
                axis if axis is not None else self.system.atom(size)
                for axis, size in zip(axes, self.out_shape(k), strict=True)
            ]
            for k, axes in enumerate(self.result_axes)
        ]
        return OpAxes(
            self.operands,
            self.operand_axes,
            outs,
            self.loops,
            self.boundaries,
            self.emit,
            self.bias,
            self.operator,
            self._windows,
            self.cut,
            self.unread,
            self._kept,
            self._ignored,
        )


RuleFunction = Callable[[Rule], None]


class RuleBook:
    """Which rule types which operator."""

    def __init__(self) -> None:
        self._rules: dict[str, RuleFunction] = {}

    def rule(self, *names: str) -> Callable[[RuleFunction], RuleFunction]:
        """Register a function for the ATen operators of these names, whatever the overload.

        Raises:
            ValueError: on registration, where one of them has a rule already.
        """

        def register(function: RuleFunction) -> RuleFunction:
            for name in names:
                if name in self._rules:
                    raise ValueError(f"two rules for {name}")
                self._rules[name] = function
            return function

        return register

    def include(self, other: RuleBook) -> None:
        """Register every rule of another book as well.

        Raises:
            ValueError: where both books have a rule for one operator.
        """
        for name, function in other._rules.items():
            self.rule(name)(function)

    def find(self, target: Any) -> RuleFunction | None:
        """The rule of an operator, or None; operators tagged pointwise by PyTorch need none of their own."""
        if not isinstance(target, torch._ops.OpOverload):
            return None
        rule_function = self._rules.get(operator_name(target))
        if rule_function is None and torch.Tag.pointwise in target.tags:
            rule_function = self._rules["pointwise"]
        return rule_function


def operator_name(target: torch._ops.OpOverload) -> str:
    """``aten.add.Tensor`` is ``add``; operators of other libraries keep their library's name."""
    namespace, name = target._schema.name.split("::")
    return name if namespace == "aten" else f"{namespace}.{name}"


def type_opaquely(rule: Rule, reason: str) -> None:
    """Everything whole in, laid out in memory as it was captured, and fresh axes out; ``reason`` is that of each dim's
    boundary."""
    rule.emit = lambda ctx: ctx.as_captured()
    for operand, axes in enumerate(rule.actual):
        for dim in range(len(axes)):
            rule.opaque(operand, dim, reason)
