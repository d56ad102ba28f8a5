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

from torch import fx

from xdit_compile.errors import PartitionError
from xdit_compile.passes.axes.infer import Frame
from xdit_compile.passes.axes.operators import AttentionOp, ConvolutionOp, LinearOp, NormOp
from xdit_compile.passes.axes.rule import OpAxes, values
from xdit_compile.passes.local.choose_loop import ShardedLoop, choose_all, feasible, required, yielded
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.emit import Emission
from xdit_compile.passes.local.halo import fetch
from xdit_compile.passes.local.layout import Layout
from xdit_compile.passes.local.ledger import Ledger
from xdit_compile.passes.local.local_graph import State, Value, aten
from xdit_compile.passes.lowering import convolution, norm, small_linear, stale_attention
from xdit_compile.plan.methods import PATCH

LOWERINGS = {
    AttentionOp: stale_attention.lower,
    ConvolutionOp: convolution.lower,
    LinearOp: small_linear.lower,
    NormOp: norm.lower,
}
"""What runs operators that need more than one of their loops split, by the kind that their rules state.

Each is given the graph of the call as it grows, the node, its axes, and its operands as they lie. It gives back all
results of the node, or None where the operator is to be called as any other.
"""


@dataclasses.dataclass
class LocalStructure:
    """What one rank runs for one structure, and what each result is."""

    module: fx.GraphModule
    results: list[Value | None]
    ledger: Ledger
    states: Sequence[State]


class StructurePartitioner(LoweringContext):
    """Partitions the graph of one call.

    Args:
        arguments: one for each placeholder, as it lies on the ranks.
        wanted: nodes of which somebody wants every position.
    """

    def __init__(self, frame: Frame, layout: Layout, arguments: Sequence[Value], wanted: set[fx.Node], place: Any):
        super().__init__(frame, layout, place)
        self.wanted = wanted
        self._arguments = iter(arguments)

    def run(self, results: Sequence[Any], requests: Sequence[Sequence[str]]) -> LocalStructure:
        """Partition every node.

        Args:
            results: the leaves of the graph's output that are wanted, None for others.
            requests: for each the forms in which it is wanted, in order: ``whole``, ``split``, or ``gathered`` (over
                all but patches); none for None.

        Returns:
            The local structure; of its results one for each form.

        Raises:
            PartitionError: where something cannot be split and may not be gathered; with its place.
        """
        for node in self.frame.graph.nodes:
            if node.op == "placeholder":
                argument = next(self._arguments)
                local = self.local.graph.placeholder(node.name)
                self.env[node] = [dataclasses.replace(argument, node=local)]
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
            whole = self.redistribute(value, value.axes, patch, leaf, -1)
            return dataclasses.replace(value, node=whole, split=patch)
        if form == "split" and value.replicated:
            return self.sliced_where_possible(value)
        return value if form == "split" or value.replicated or only else None

    def _visit(self, node: fx.Node) -> list[Value]:
        op_axes = self.frame.op_axes[node]
        operands = [self.latest(self.env[operand][0]) for operand in op_axes.operands]
        whole = node in self.wanted and all(operands[operand].replicated for operand in op_axes.read())
        try:
            lowered = None if whole else self._special(node, op_axes, operands)
            if lowered is not None:
                return lowered
            choices = {} if whole else choose_all(op_axes, operands, self.sharding.splits)
            return self.emit(node, op_axes, operands, choices)
        except PartitionError as error:
            raise PartitionError(f"{self.place(node)} {error}") from None

    def _special(self, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
        lower = LOWERINGS.get(type(op_axes.operator))
        return lower(self, node, op_axes, operands) if lower is not None else None

    def emit(
        self, node: fx.Node, op_axes: OpAxes, operands: list[Value], choices: Mapping[str, ShardedLoop]
    ) -> list[Value]:
        """Call the operator on this rank with the chosen loops split.

        Args:
            operands: as they lie; they are laid out as the loops want them.
            choices: the loop that each mesh dimension splits.

        Returns:
            One value for each result of the node; partial where what it sums over is split, unless a bias is added.
        """
        apart = self._summed_over_patches(op_axes)
        if apart is not None:
            return self._patch_by_patch(node, op_axes, operands, {**choices, PATCH: apart})
        locals_ = []
        for operand, value in enumerate(operands):
            if operand in op_axes.ignored:
                locals_.append(value.node)
                continue
            axes, split = op_axes.operand_axes[operand], required(choices, operand)
            locals_.append(self.redistribute(value, axes, split, node, operand))
        outs = [yielded(choices, k) for k in range(len(op_axes.result_axes))]
        summed = [name for name, choice in choices.items() if choice.loop.kind in ("sum", "mean")]
        if op_axes.windows:
            locals_[0], seen = fetch(self, op_axes, locals_[0], choices)
        else:
            seen = {}
        emission = Emission(self, node, op_axes, locals_, choices, outs, seen)
        self.count(node, op_axes, choices)
        result = emission.run(summed)
        return self._values(node, op_axes, result, outs, summed)

    def _values(
        self, node: fx.Node, op_axes: OpAxes, result: fx.Node, outs: list[dict[str, int]], summed: list[str]
    ) -> list[Value]:
        tensors = values(node)
        several = isinstance(node.meta["val"], tuple | list)
        results = []
        for k, tensor in enumerate(tensors):
            local = self.local.call(operator.getitem, result, k) if several else result
            value = Value(local, op_axes.result_axes[k], tensor.dtype, outs[k], frozenset(summed))
            sizes = self.local.sizes(value)
            local.meta["shape"] = (node.name, sizes)
            self.ledger.hold(math.prod(sizes) * tensor.dtype.itemsize)
            results.append(value)
        if PATCH in summed:
            results = [self._kept_sum(node, k, value) for k, value in enumerate(results)]
        if op_axes.bias is not None and summed:
            results = [self._biased(node, op_axes, value) for value in results]
        return results

    def _summed_over_patches(self, op_axes: OpAxes) -> ShardedLoop | None:
        """The sum over tokens of which each patch must leave its own part, where all patches are computed at once."""
        patches = self.layout.patches
        if patches is None or PATCH in self.sharding.splits:
            return None
        loops = (loop for loop in op_axes.loops if loop.kind in ("sum", "mean"))
        return next((choice for loop in loops if (choice := feasible(op_axes, loop, patches)) is not None), None)

    def _patch_by_patch(
        self, node: fx.Node, op_axes: OpAxes, operands: list[Value], choices: Mapping[str, ShardedLoop]
    ) -> list[Value]:
        """One call for each patch, made as the program of that patch makes it; the last one has the sum of all."""
        patches, results = self.layout.patches, []
        assert patches is not None
        for patch in range(patches.parts):
            layout = self.layout.keeping(patches, patch)
            one = copy.copy(self)
            one.layout, one.sharding, one._redistributed, one._scatters = layout, layout.sharding, {}, {}
            one.local = copy.copy(self.local)
            one.local.sharding = layout.sharding
            results = one.emit(node, op_axes, operands, choices)
        return results

    def _kept_sum(self, node: fx.Node, result: int, value: Value) -> Value:
        """The sum of what every patch left, this one's put in its place."""
        assert self.layout.patches is not None
        row = self.local.call(aten.unsqueeze.default, value.node, 0)
        rows = self.rows_of_patches(f"{node.name}_sum_{result}", self.local.sizes(value), value.dtype)
        self.put_row(*rows, row)
        total = self.local.call(aten.sum.dim_IntList, rows[0], [0])
        return dataclasses.replace(value, node=total, partial=value.partial - {PATCH})

    def _biased(self, node: fx.Node, op_axes: OpAxes, value: Value) -> Value:
        total = self.summed(value)
        assert op_axes.bias is not None
        bias = self.latest(self.env[op_axes.operands[op_axes.bias]][0])
        column = {name: len(bias.axes) - 1 for name, dim in total.split.items() if dim == len(total.axes) - 1}
        local = self.redistribute(bias, op_axes.operand_axes[op_axes.bias], column, node, op_axes.bias)
        return dataclasses.replace(total, node=self.local.call(aten.add.Tensor, total.node, local))
