"""Values laid out otherwise: partial sums added up, what is split gathered, what is whole sliced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from xdit_compile.errors import PartitionError
from xdit_compile.ir.axes import Axis, same
from xdit_compile.ir.sharding import Sharding
from xdit_compile.passes.axes.infer import Frame, Place
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.plan.methods import GATHERED

from .layout import Layout
from .ledger import Gather, Ledger
from .local_graph import LocalGraph, Value


class Redistributor:
    """Lays out values of one call on one rank as they are wanted; what it did once it does not do again.

    A mesh dimension is told by its name in ``layout``.

    Args:
        frame: the call, with the axes of its values.
        place: where a node of it stands, for the ledger.
    """

    def __init__(self, frame: Frame, layout: Layout, place: Callable[[fx.Node], Place]):
        self.frame, self.layout, self.place = frame, layout, place
        self.sharding: Sharding = layout.sharding
        self.local = LocalGraph(layout.sharding, layout.groups, layout.parts)
        self.ledger = Ledger()
        self._redistributed: dict[tuple, fx.Node] = {}
        self._sums: dict[int, tuple[Value, Value]] = {}
        self._scatters: dict[int, tuple[Value, Value]] = {}

    def parts(self, name: str) -> int:
        """Into how many parts a mesh dimension splits."""
        return self.layout.parts[name]

    def summed(self, value: Value, purpose: str = "partial sum") -> Value:
        """The value with its partial sums added up: one all-reduce for each mesh dimension, counted as ``purpose``."""
        total = self.latest(value)
        for name in sorted(total.partial):
            node = self.local.reduce(total.node, name)
            self.ledger.collective("all_reduce", purpose, node, total, self.local, self.parts(name))
            total = dataclasses.replace(total, node=node, partial=total.partial - {name})
        self._sums[id(value)] = (value, total)
        return total

    def latest(self, value: Value) -> Value:
        """The value itself, or with its partial sums added up where that was done already."""
        return self._sums.get(id(value), (value, value))[1]

    def sliced_where_possible(self, value: Value) -> Value:
        """A replicated value split over every mesh dimension that can split a dim of it."""
        split: dict[str, int] = {}
        node = value.node
        for name, dim in self.layout.natural(value.axes).items():
            node = self.local.slice(node, dim, value.axes[dim], name, [n for n, d in split.items() if d == dim])
            split[name] = dim
        return dataclasses.replace(value, node=node, split=split)

    def redistribute(
        self, value: Value, expected: Sequence[Axis], required: Mapping[str, int], node: fx.Node, operand: int
    ) -> fx.Node:
        """Lay a value out as an operator wants it: summed, gathered where it lies otherwise, sliced where it is whole.

        Args:
            expected: the axis by which each of its dims is split, if it is.
            required: the dim that each mesh dimension splits then; what is not named there splits none.
            node: who wants it, as which ``operand``, or -1 for a result of the graph: the reason of a gather.

        Returns:
            The node of this rank's graph that holds it. Asked again, the same.

        Raises:
            PartitionError: where it would be gathered for an operator and the layout refuses that, or where a dim that
                patches in time split would be.
        """
        value = self._scattered(value, expected, required, node, operand) or self.summed(value)
        key = (id(value), tuple(sorted(required.items())), tuple(id(expected[d]) for d in required.values()))
        if key not in self._redistributed:
            self._redistributed[key] = self._redistribute(value, expected, required, node, operand)
        return self._redistributed[key]

    def _scattered(
        self, value: Value, expected: Sequence[Axis], required: Mapping[str, int], node: fx.Node, operand: int
    ) -> Value | None:
        """A partial sum of which ranks want their own positions alone, added up for just these: half of the traffic.

        None where it is no such sum, or somebody else reads it, who may want all of it.
        """
        if id(value) in self._scatters:
            return self._scatters[id(value)][1]
        op_axes, partial = self.frame.op_axes.get(node), [*self.latest(value).partial]
        if op_axes is None or operand < 0 or len(partial) != 1 or partial[0] not in required:
            return None
        (name,), dim = partial, required[partial[0]]
        if len(op_axes.operands[operand].users) > 1 or not same(value.axes[dim], expected[dim]):
            return None
        also = [other for other, split_dim in value.split.items() if split_dim == dim]
        tensor, sizes = self.local.scatter(value.node, dim, value.axes[dim], name, also)
        numel = math.prod(self.local.sizes(value))
        elements = numel - numel // max(sum(sizes), 1) * sizes[self.sharding.index[name]]
        self.ledger.sent("reduce_scatter", "partial sum", elements, value.dtype)
        scattered = dataclasses.replace(value, node=tensor, split={**value.split, name: dim}, partial=frozenset())
        self._scatters[id(value)] = (value, scattered)
        return scattered

    def _redistribute(
        self, value: Value, expected: Sequence[Axis], required: Mapping[str, int], node: fx.Node, operand: int
    ) -> fx.Node:
        kept = {
            name: dim
            for name, dim in value.split.items()
            if required.get(name) == dim and same(value.axes[dim], expected[dim])
        }
        if kept != dict(value.split):
            value = self._gathered(value, kept, node, operand)
        local, split = value.node, dict(value.split)
        for name, dim in required.items():
            if name not in kept:
                also = [other for other, split_dim in split.items() if split_dim == dim]
                local = self.local.slice(local, dim, expected[dim], name, also)
                split[name] = dim
        return local

    def _gathered(self, value: Value, kept: Mapping[str, int], node: fx.Node, operand: int) -> Value:
        local, split = value.node, dict(value.split)
        for name in [name for name in split if name not in kept]:
            dim = split.pop(name)
            also = [other for other, split_dim in split.items() if split_dim == dim]
            before = dataclasses.replace(value, split={**split, name: dim})
            local, _ = self.local.gather(local, dim, value.axes[dim], name, also)
            if name == GATHERED and _is_attended(self.frame.op_axes.get(node), operand, dim):
                self.ledger.collective("all_gather", "attention", local, before, self.local, self.parts(name))
                continue
            sent = self.ledger.collective("all_gather", "gather", local, before, self.local, self.parts(name))
            reason = "the result" if operand < 0 else _reason(self.frame.op_axes.get(node), operand, dim)
            self.ledger.gathers.append(Gather(self.place(node), reason, tuple(split), sent))
            if self.layout.refuse_gathers and operand >= 0:
                raise PartitionError(f"would gather: {reason}")
        return dataclasses.replace(value, node=local, split=split)


def _is_attended(op_axes: OpAxes | None, operand: int, dim: int) -> bool:
    """Whether a dim holds tokens of keys or values, which queries of every rank attend to."""
    return op_axes is not None and any(loop.kind == "keys" and (operand, dim) in loop.args for loop in op_axes.loops)


def _reason(op_axes: OpAxes | None, operand: int, dim: int) -> str:
    for boundary in op_axes.boundaries if op_axes else ():
        if (boundary.operand, boundary.dim) == (operand, dim):
            return boundary.reason
    return "needs every position"
