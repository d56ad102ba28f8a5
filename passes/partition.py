"""The partitioner: rewrites a program whose axes are known into what one rank runs.

It knows neither models nor methods. For every operator and every mesh dimension it splits the loop along which the
operands already lie; slices what is whole, gathers what lies otherwise, sums what was contracted.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from xdit_compile.axes import Axis, same
from xdit_compile.errors import PartitionError
from xdit_compile.shards import Sharding

from . import column_lowering, convolution_lowering, kept_attention, norm_lowering
from .choices import Choice, choose_all, feasible, required, yielded
from .emission import Emission
from .flops import flops
from .halo import fetch
from .infer import Frame
from .layout import PATCH, Layout
from .local import LocalGraph, State, Value, aten
from .records import STALE, Gather, Ledger
from .rules import Typing, values
from .stale import Exchange

LOWERINGS = {
    "attention": kept_attention.lower,
    "convolution": convolution_lowering.lower,
    "linear": column_lowering.lower,
    "norm": norm_lowering.lower,
}
"""What runs operators that need more than one of their loops split, by the fact that their rules state."""


@dataclasses.dataclass
class LocalStructure:
    """What one rank runs for one structure, and what each result is."""

    module: fx.GraphModule
    results: list[Value | None]
    ledger: Ledger
    states: Sequence[State]


class FramePartitioner:
    """Partitions the graph of one call."""

    def __init__(self, frame: Frame, layout: Layout, given: Sequence[Value], wanted: set[fx.Node], place: Any):
        self.frame = frame
        self.layout = layout
        self.sharding: Sharding = layout.sharding
        self.local = LocalGraph(layout.sharding, layout.groups, layout.parts)
        self.env: dict[fx.Node, list[Value]] = {}
        self.ledger = Ledger()
        self.wanted = wanted
        self.place = place
        self._given = iter(given)
        self._coerced: dict[tuple, fx.Node] = {}

    def run(self, results: Sequence[Any], requests: Sequence[Sequence[str]]) -> LocalStructure:
        """Partition every node; ``requests`` names the forms in which each result is wanted, in order."""
        for node in self.frame.graph.nodes:
            if node.op == "placeholder":
                given = next(self._given)
                local = self.local.graph.placeholder(node.name)
                self.env[node] = [dataclasses.replace(given, node=local)]
            elif node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function" and node.target is operator.getitem:
                self.env[node] = [self.env[node.args[0]][node.args[1]]]
            elif node.op == "call_function":
                self.env[node] = self._visit(node)
        finals = [
            self._result(leaf, form, len(forms) == 1)
            for leaf, forms in zip(results, requests, strict=True)
            for form in forms
        ]
        module = self.local.finish([final.node if final is not None else None for final in finals])
        return LocalStructure(module, finals, self.ledger, self.local.states)

    def _constant(self, node: fx.Node) -> None:
        value = self.layout.attribute(self.frame, str(node.target))
        local = self.local.constant(value)
        self.env[node] = [Value(local, self.frame.axes[node][0], value.dtype)]

    def _result(self, leaf: fx.Node, form: str, only: bool) -> Value | None:
        """A result in one form; None where a split value was wanted whole and is given split as well."""
        value = self.summed(self.env[leaf][0])
        if form == "gathered":
            lies = self.layout.natural(value.axes) if self.layout.one_patch else {}
            patch = {name: dim for name, dim in lies.items() if name == PATCH}
            whole = self.coerce(value, value.axes, patch, leaf, -1)
            return dataclasses.replace(value, node=whole, split=patch)
        if form == "split" and value.replicated:
            return self.sliced_where_possible(value)
        return value if form == "split" or value.replicated or only else None

    def sliced_where_possible(self, value: Value) -> Value:
        split: dict[str, int] = {}
        node = value.node
        for name, dim in self.layout.natural(value.axes).items():
            node = self.local.slice(node, dim, value.axes[dim], name, [n for n, d in split.items() if d == dim])
            split[name] = dim
        return dataclasses.replace(value, node=node, split=split)

    def _visit(self, node: fx.Node) -> list[Value]:
        typing = self.frame.typings[node]
        operands = [self.env[operand][0] for operand in typing.operands]
        whole = node in self.wanted and all(operands[at].replicated for at in typing.read())
        try:
            lowered = None if whole else self._special(node, typing, operands)
            if lowered is not None:
                return lowered
            choices = {} if whole else choose_all(typing, operands, self.sharding.splits)
            return self.emit(node, typing, operands, choices)
        except PartitionError as error:
            raise PartitionError(f"{self.place(node)} {error}") from None

    def _special(self, node: fx.Node, typing: Typing, operands: list[Value]) -> list[Value] | None:
        found = next((lower for fact, lower in LOWERINGS.items() if fact in typing.facts), None)
        return found(self, node, typing, operands) if found is not None else None

    def emit(self, node: fx.Node, typing: Typing, operands: list[Value], choices: Mapping[str, Choice]) -> list[Value]:
        """Call the operator on this rank with the chosen loops split."""
        apart = self._summed_over_patches(typing)
        if apart is not None:
            return self._patch_by_patch(node, typing, operands, {**choices, PATCH: apart})
        locals_ = []
        for at, value in enumerate(operands):
            if at in typing.ignored:
                locals_.append(value.node)
                continue
            locals_.append(self.coerce(value, typing.expected[at], required(choices, at), node, at))
        outs = [yielded(choices, k) for k in range(len(typing.outs))]
        summed = [name for name, choice in choices.items() if choice.loop.kind in ("sum", "mean")]
        if "windows" in typing.facts:
            locals_[0], seen = fetch(self, typing, locals_[0], choices)
        else:
            seen = {}
        context = Emission(self, node, typing, locals_, choices, outs, seen)
        self.count(node, typing, choices)
        result = context.run(summed)
        return self._values(node, typing, result, outs, summed)

    def _values(
        self, node: fx.Node, typing: Typing, result: fx.Node, outs: list[dict[str, int]], summed: list[str]
    ) -> list[Value]:
        tensors = values(node)
        several = isinstance(node.meta["val"], tuple | list)
        found = []
        for k, tensor in enumerate(tensors):
            local = self.local.call(operator.getitem, result, k) if several else result
            value = Value(local, typing.outs[k], tensor.dtype, outs[k], frozenset(summed))
            sizes = self.local.sizes(value)
            local.meta["shape"] = (node.name, sizes)
            self.ledger.hold(math.prod(sizes) * tensor.dtype.itemsize)
            found.append(value)
        if PATCH in summed:
            found = [self._kept_sum(node, k, value) for k, value in enumerate(found)]
        if typing.bias is not None and summed:
            found = [self._biased(node, typing, value) for value in found]
        return found

    def _summed_over_patches(self, typing: Typing) -> Choice | None:
        """The sum over tokens of which each patch must leave its own part, where all patches are computed at once."""
        patches = self.layout.patches
        if patches is None or PATCH in self.sharding.splits:
            return None
        loops = (loop for loop in typing.loops if loop.kind in ("sum", "mean"))
        return next((choice for loop in loops if (choice := feasible(typing, loop, patches)) is not None), None)

    def _patch_by_patch(
        self, node: fx.Node, typing: Typing, operands: list[Value], choices: Mapping[str, Choice]
    ) -> list[Value]:
        """One call for each patch, made as the program of that patch makes it; the last one has the sum of all."""
        patches, found = self.layout.patches, []
        assert patches is not None
        for patch in range(patches.parts):
            layout = self.layout.keeping(patches, patch)
            one = copy.copy(self)
            one.layout, one.sharding, one._coerced = layout, layout.sharding, {}
            one.local = copy.copy(self.local)
            one.local.sharding = layout.sharding
            found = one.emit(node, typing, operands, choices)
        return found

    def _kept_sum(self, node: fx.Node, at: int, value: Value) -> Value:
        """The sum of what every patch left, this one's put in its place."""
        assert self.layout.patches is not None
        part = self.local.call(aten.unsqueeze.default, value.node, 0)
        rows = self.rows_of_patches(f"{node.name}_sum_{at}", self.local.sizes(value), value.dtype)
        self.put_row(*rows, part)
        total = self.local.call(aten.sum.dim_IntList, rows[0], [0])
        return dataclasses.replace(value, node=total, partial=value.partial - {PATCH})

    def rows_of_patches(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[fx.Node, Exchange | None]:
        """A state of what every patch left, one row of ``shape`` for each, and how others' rows come."""
        assert self.layout.patches is not None
        whole = [self.layout.patches.parts, *shape]
        exchange = self.exchange_all(0, None, whole, dtype)
        return self.local.state(name, whole, dtype, exchange), exchange

    def put_row(self, state: fx.Node, exchange: Exchange | None, row: fx.Node) -> None:
        """Put this patch's row, [1, ...], in its place; those of all ranks where they are gathered."""
        here = self.sharding.index[PATCH]
        held = np.arange(here, here + 1)
        if exchange is not None and not self.layout.stale:
            gather = torch.ops.xdit_compile.all_gather.default
            row = self.local.call(gather, row, 0, list(exchange.sizes), exchange.group)
            held = np.arange(len(exchange.sizes))
        self.local.put(state, row, 0, held)

    def _biased(self, node: fx.Node, typing: Typing, value: Value) -> Value:
        total = self.summed(value)
        bias = self.env[typing.operands[typing.bias]][0]  # type: ignore[index]
        column = {name: len(bias.axes) - 1 for name, dim in total.split.items() if dim == len(total.axes) - 1}
        local = self.coerce(bias, typing.expected[typing.bias], column, node, typing.bias)  # type: ignore[index]
        return dataclasses.replace(total, node=self.local.call(aten.add.Tensor, total.node, local))

    def summed(self, value: Value, purpose: str = "partial sum") -> Value:
        """The value with its partial sums added up."""
        for name in sorted(value.partial):
            node = self.local.reduce(value.node, name)
            self.ledger.collective("all_reduce", purpose, node, value, self.local, self.parts(name))
            value.node, value.partial = node, value.partial - {name}
        return value

    def exchange_all(self, dim: int, axis: Axis | None, shape: Sequence[int], dtype: torch.dtype) -> Exchange | None:
        """How a state of ``shape`` of which every rank wants all comes from them, counted; None where one rank has all.

        Args:
            dim: the dim that patches split: by ``axis``, or with one row for each where it is None.
        """
        if not self.layout.apart:
            return None
        split, here = self.sharding.splits[PATCH], self.sharding.index[PATCH]
        held = [
            np.arange(rank, rank + 1) if axis is None else split.positions(axis, rank) for rank in range(split.parts)
        ]
        found = Exchange.of_all(dim, held, here, self.layout.mesh.behind)
        self.ledger.sent(STALE if self.layout.stale else "all_gather", "state", found.elements(shape), dtype)
        return found

    def parts(self, name: str) -> int:
        return self.layout.parts[name]

    def coerce(
        self, value: Value, expected: Sequence[Axis], required: Mapping[str, int], node: fx.Node, at: int
    ) -> fx.Node:
        """The value laid out so that mesh dimension ``m`` splits its dim ``required[m]`` by the expected axis."""
        value = self.summed(value)
        key = (id(value), tuple(sorted(required.items())), tuple(id(expected[d]) for d in required.values()))
        if key not in self._coerced:
            self._coerced[key] = self._coerce(value, expected, required, node, at)
        return self._coerced[key]

    def _coerce(
        self, value: Value, expected: Sequence[Axis], required: Mapping[str, int], node: fx.Node, at: int
    ) -> fx.Node:
        kept = {
            name: dim
            for name, dim in value.split.items()
            if required.get(name) == dim and same(value.axes[dim], expected[dim])
        }
        if kept != dict(value.split):
            value = self._gathered(value, kept, node, at)
        local, split = value.node, dict(value.split)
        for name, dim in required.items():
            if name not in kept:
                also = [other for other, own in split.items() if own == dim]
                local = self.local.slice(local, dim, expected[dim], name, also)
                split[name] = dim
        return local

    def _gathered(self, value: Value, kept: Mapping[str, int], node: fx.Node, at: int) -> Value:
        local, split = value.node, dict(value.split)
        for name in [name for name in split if name not in kept]:
            dim = split.pop(name)
            also = [other for other, own in split.items() if own == dim]
            before = dataclasses.replace(value, split={**split, name: dim})
            local, _ = self.local.gather(local, dim, value.axes[dim], name, also)
            sent = self.ledger.collective("all_gather", "gather", local, before, self.local, self.parts(name))
            self.ledger.gathers.append(
                Gather(
                    self.place(node),
                    "the result" if at < 0 else _reason(self.frame.typings.get(node), at, dim),
                    tuple(split),
                    sent,
                )
            )
            if self.layout.refuse_gathers and at >= 0:
                raise PartitionError(f"would gather: {self.ledger.gathers[-1].reason}")
        return dataclasses.replace(value, node=local, split=split)

    def count(self, node: fx.Node, typing: Typing, choices: Mapping[str, Choice]) -> None:
        """Count the work of a node, and how much of it this rank does."""
        total = flops(node)
        if not total:
            return
        portion = 1.0
        for name, choice in choices.items():
            tensor, dim = next(iter(choice.operands.items()), (None, 0))
            axis = typing.expected[tensor][dim] if tensor is not None else typing.outs[0][choice.results[0]]
            portion *= self.sharding.length(axis, [name]) / max(axis.size, 1)
        self.ledger.work(total, portion, tuple(choices))


def _reason(typing: Typing | None, operand: int, dim: int) -> str:
    for boundary in typing.boundaries if typing else ():
        if (boundary.operand, boundary.dim) == (operand, dim):
            return boundary.reason
    return "needs every position"
