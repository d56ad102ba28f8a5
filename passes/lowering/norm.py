"""Norms over split dims: statistics of all ranks joined by one small exchange, or whole groups by themselves.

Where ranks do not wait for one another, the others' statistics are those of the step before, corrected by how much this
rank's own have changed since (DistriFusion, arXiv:2402.19481, section 4.3).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import fx

import xdit_compile.kernels.scale_shift  # noqa: F401  (registers the op that the graphs call)
from xdit_compile.ir.arguments import integer_of, number_of, overload_of, sequence_of
from xdit_compile.ir.axes import Atom, Axis, same
from xdit_compile.ir.sharding import Split
from xdit_compile.passes.axes.operators import NormOp
from xdit_compile.passes.axes.rule import OpAxes, operator_name
from xdit_compile.passes.local.choose_loop import choose_all, yielded
from xdit_compile.passes.local.context import LoweringContext
from xdit_compile.passes.local.local_graph import Value, aten
from xdit_compile.plan.methods import PATCH

ROOT_MEAN_SQUARE = ("rms_norm", "_fused_rms_norm")
CENTRED = ("layer_norm", "native_layer_norm")
PIECES = 16
"""Of which statistics are taken one after the other where memory is spared."""


def lower(context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]) -> list[Value] | None:
    """The norm on this rank's positions, or None where no normalised dim is split or another way is needed.

    Returns:
        The result, split as the input is; after it the statistics, where the operator yields them.
    """
    name = operator_name(overload_of(node))
    if name == "group_norm":
        return _Grouped(context, node, op_axes, operands).emit()
    return _Trailing(context, node, op_axes, operands).emit(centred=name in CENTRED)


class _Grouped:
    """A group norm of which this rank holds whole groups, or some positions of each."""

    def __init__(self, context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]):
        self.context, self.node, self.op_axes, self.operands = context, node, op_axes, operands
        assert isinstance(op_axes.operator, NormOp)
        self.norm = op_axes.operator
        self.input, self.axes = context.summed(operands[0]), op_axes.operand_axes[0]
        self.size = self.axes[1].size // integer_of(node.args[1])
        kept = {name: dim for name, dim in self.input.split.items() if same(self.input.axes[dim], self.axes[dim])}
        self.channels = [name for name, dim in kept.items() if dim == 1]
        self.space = {name: dim for name, dim in kept.items() if dim > 1}

    def emit(self) -> list[Value] | None:
        splits = self.context.sharding.splits
        if any(not _are_whole(splits[name], self.axes[1], self.size) for name in self.channels) or len(self.space) > 1:
            return None
        if not self.channels and not self.space:
            return None
        others = {n: split for n, split in splits.items() if n not in self.channels and n not in self.space}
        choices = choose_all(self.op_axes, self.operands, others)
        split = {**yielded(choices, 0), **dict.fromkeys(self.channels, 1), **self.space}
        tensors = [self.context.redistribute(self.input, self.axes, split, self.node, 0)]
        for operand, value in enumerate(self.operands[1:], 1):
            required, axes = dict.fromkeys(self.channels, 0), self.op_axes.operand_axes[operand]
            tensors.append(self.context.redistribute(value, axes, required, self.node, operand))
        value = Value(tensors[0], self.op_axes.result_axes[0], self.input.dtype, split)
        sizes = self.context.local.sizes(value)
        affine = [None if operand is None else tensors[operand] for operand in (self.norm.weight, self.norm.bias)]
        if self.space:
            made = self._over_space(tensors[0], affine, sizes)
        elif 0 in sizes:
            made = self.context.local.call(aten.new_zeros.default, tensors[0], sizes)
        else:
            groups = sizes[1] // self.size
            made = self.context.local.call(self.node.target, tensors[0], groups, *affine, self._epsilon())
        return [dataclasses.replace(value, node=made)]

    def _epsilon(self) -> float:
        return number_of(self.node.args[4] if len(self.node.args) > 4 else self.node.kwargs.get("eps", 1e-5))

    def _over_space(self, inputs: fx.Node, affine: list[fx.Node | None], sizes: list[int]) -> fx.Node:
        """Statistics of every group from the positions of all ranks, float32 at least."""
        ((name, dim),) = self.space.items()
        call, dtype = self.context.local.call, self.input.dtype
        wide = torch.promote_types(dtype, torch.float32)
        split, groups = self.context.sharding.splits[name], sizes[1] // self.size
        rest = self.size * math.prod(size for other, size in enumerate(sizes) if other > 1 and other != dim)
        counts = [split.length(self.axes[dim], index) * rest for index in range(split.parts)]
        view = [sizes[0], groups, counts[self.context.sharding.index[name]]]
        flat = call(aten.reshape.default, inputs, view)
        pieces = PIECES if self.context.layout.sparing else 1
        local = moments_in_pieces(call, flat, view[2], dtype, wide, pieces)
        statistics = self._kept if name == PATCH and self.context.layout.apart else self._merged
        mean, variance = statistics(local, name, counts, sizes[0], groups, wide)
        affine = [_cast(self.context, factor, dtype, wide) if factor is not None else None for factor in affine]
        scale, shift = columns(call, sizes, groups, (mean, variance), affine, self._epsilon())
        return call(torch.ops.xdit_compile.scale_shift.default, inputs, scale, shift)

    def _merged(
        self, local: tuple[fx.Node, fx.Node], name: str, counts: list[int], batch: int, groups: int, wide: torch.dtype
    ) -> tuple[fx.Node, fx.Node]:
        return _merge(self.context, local, 2, name, counts, batch * groups, wide)

    def _kept(
        self, local: tuple[fx.Node, fx.Node], name: str, counts: list[int], batch: int, groups: int, wide: torch.dtype
    ) -> tuple[fx.Node, fx.Node]:
        """Mean and biased variance from what ranks keep: mean and mean of squares of each one's positions."""
        call, here, total = self.context.local.call, self.context.sharding.index[name], sum(counts)
        mean, variance = local[0], call(aten.div.Scalar, local[1], max(counts[here], 1))
        squares = call(aten.add.Tensor, variance, call(aten.mul.Tensor, mean, mean))
        row = call(aten.unsqueeze.default, call(aten.cat.default, [mean, squares], 2), 0)
        state, exchange = self.context.rows_of_patches(f"{self.node.name}_moments", [batch, groups, 2], wide)
        if not self.context.layout.stale:
            self.context.put_row(state, exchange, row)
            return self._merged(local, name, counts, batch, groups, wide)
        weights = torch.tensor(counts, dtype=wide).div(total).reshape(-1, 1, 1, 1)
        weighted = call(aten.mul.Tensor, state, self.context.local.constant(weights))
        before = call(aten.sum.dim_IntList, weighted, [0], True)
        changed = call(aten.sub.Tensor, row, call(aten.slice.Tensor, state, 0, here, here + 1))
        moments_ = call(aten.squeeze.dim, call(aten.add.Tensor, before, changed), 0)
        self.context.put_row(state, exchange, row)
        mean, squares = (call(aten.slice.Tensor, moments_, 2, column, column + 1) for column in range(2))
        corrected = call(aten.sub.Tensor, squares, call(aten.mul.Tensor, mean, mean))
        return mean, call(aten.where.self, call(aten.lt.Scalar, corrected, 0), variance, corrected)


def columns(
    call: Callable[..., fx.Node],
    sizes: Sequence[int],
    groups: int,
    statistics: tuple[fx.Node, fx.Node],
    affine: Sequence[fx.Node | None],
    epsilon: float,
) -> tuple[fx.Node, fx.Node]:
    """What a group norm of known statistics multiplies every channel by and adds to it: [batch, channels, 1, ...].

    Args:
        sizes: the shape of what is normalised.
        statistics: mean and biased variance, [batch, groups, 1].
        affine: weight and bias of every channel, or none, of the dtype of the statistics.
    """
    (mean, variance), (weight, bias) = statistics, affine
    scale = call(aten.rsqrt.default, call(aten.add.Scalar, variance, epsilon))
    each = [sizes[0], groups, sizes[1] // max(groups, 1)]
    mean, scale = (
        call(aten.reshape.default, call(aten.expand.default, statistic, each), list(sizes[:2]))
        for statistic in (mean, scale)
    )
    if weight is not None:
        scale = call(aten.mul.Tensor, scale, weight)
    shift = call(aten.neg.default, call(aten.mul.Tensor, mean, scale))
    if bias is not None:
        shift = call(aten.add.Tensor, shift, bias)
    column = [sizes[0], sizes[1], *[1] * (len(sizes) - 2)]
    return call(aten.reshape.default, scale, column), call(aten.reshape.default, shift, column)


def _are_whole(split: Split, axis: Axis, size: int) -> bool:
    """Whether every rank holds whole groups of ``size`` neighbours, in order."""
    held = [split.positions(axis, index) for index in range(split.parts)]
    return all(
        len(positions) % size == 0
        and np.array_equal(
            positions, np.repeat(positions[::size], size) + np.tile(np.arange(size), len(positions) // size)
        )
        and not (positions[::size] % size).any()
        for positions in held
    )


class _Trailing:
    """A norm over trailing dims, of which some are split.

    Statistics are float32, or float64 where the input is, as PyTorch's own kernels have them.
    """

    def __init__(self, context: LoweringContext, node: fx.Node, op_axes: OpAxes, operands: list[Value]):
        self.context, self.node, self.op_axes, self.operands = context, node, op_axes, operands
        assert isinstance(op_axes.operator, NormOp)
        self.norm = op_axes.operator
        self.input, self.axes = context.summed(operands[0]), op_axes.operand_axes[0]
        self.first = len(self.axes) - len(sequence_of(node.args[1]))
        self.dims = list(range(self.first, len(self.axes)))
        self.over = {
            name: dim
            for name, dim in self.input.split.items()
            if dim >= self.first and same(self.input.axes[dim], self.axes[dim])
        }
        self.wide = torch.promote_types(self.input.dtype, torch.float32)

    def emit(self, centred: bool) -> list[Value] | None:
        if not self.over or centred and len(self.over) > 1:
            return None
        context, call, dtype = self.context, self.context.local.call, self.input.dtype
        others = {name: split for name, split in context.sharding.splits.items() if name not in self.over}
        choices = choose_all(self.op_axes, self.operands, others)
        outer = yielded(choices, 0)
        split = {**outer, **self.over}
        inputs = _cast(context, context.redistribute(self.input, self.axes, split, self.node, 0), dtype, self.wide)
        mean, variance = self._merged(inputs, outer) if centred else (None, self._mean_square(inputs, outer))
        epsilon = self._epsilon(1e-5, 4) if centred else self._epsilon(torch.finfo(dtype).eps, 3)
        scale = call(aten.rsqrt.default, call(aten.add.Scalar, variance, epsilon))
        result = inputs if mean is None else call(aten.sub.Tensor, inputs, mean)
        result = call(aten.mul.Tensor, result, scale)
        required = {name: dim - self.first for name, dim in self.over.items()}
        for operand, apply in ((self.norm.weight, aten.mul.Tensor), (self.norm.bias, aten.add.Tensor)):
            if operand is None:
                continue
            value, axes = self.operands[operand], self.op_axes.operand_axes[operand]
            factor = context.redistribute(value, axes, required, self.node, operand)
            result = call(apply, result, _cast(context, factor, value.dtype, self.wide))
        results = [Value(_cast(context, result, self.wide, dtype), self.op_axes.result_axes[0], dtype, split)]
        statistics = [scale] if mean is None else [mean, scale]
        for axes, statistic in zip(self.op_axes.result_axes[1:], statistics, strict=False):
            results.append(Value(statistic, axes, self.wide, outer))
        return results

    def _mean_square(self, inputs: fx.Node, outer: dict[str, int]) -> fx.Node:
        call = self.context.local.call
        squares = call(aten.sum.dim_IntList, call(aten.mul.Tensor, inputs, inputs), self.dims, True)
        total = self.context.summed(self._statistic(squares, outer, frozenset(self.over)), "norm statistics")
        return call(aten.div.Scalar, total.node, math.prod(axis.size for axis in self.axes[self.first :]))

    def _merged(self, inputs: fx.Node, outer: dict[str, int]) -> tuple[fx.Node, fx.Node]:
        ((name, dim),) = self.over.items()
        rest = math.prod(axis.size for other, axis in enumerate(self.axes) if other >= self.first and other != dim)
        split = self.context.sharding.splits[name]
        counts = [split.length(self.axes[dim], index) * rest for index in range(split.parts)]
        rows = math.prod(self.context.local.sizes(self._statistic(inputs, outer, frozenset())))
        local = moments(self.context.local.call, inputs, self.dims, counts[self.context.sharding.index[name]])
        return _merge(self.context, local, self.dims[-1], name, counts, rows, self.wide)

    def _statistic(self, node: fx.Node, outer: dict[str, int], partial: frozenset[str]) -> Value:
        axes = [*self.axes[: self.first], *(Atom(1, 0) for _ in self.dims)]
        return Value(node, axes, self.wide, outer, partial)

    def _epsilon(self, default: float, position: int) -> float:
        named = self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get("eps")
        return default if named is None else number_of(named)


def _merge(
    context: LoweringContext,
    local: tuple[fx.Node, fx.Node],
    last: int,
    name: str,
    counts: list[int],
    rows: int,
    dtype: torch.dtype,
) -> tuple[fx.Node, fx.Node]:
    """Mean and variance of positions that lie on several ranks, with size 1 at ``last`` and other dims they were over.

    Ranks exchange their mean and sum of squared deviations (Chan, Golub and LeVeque, 1979); plain sums of squares would
    lose digits where the mean is large.

    Args:
        local: mean and sum of squared deviations of this rank's positions, of ``dtype``.
        name: the mesh dimension over which they lie, with ``counts`` of them on each rank.
        rows: how many statistics there are.
    """
    call, parts, total = context.local.call, len(counts), sum(counts)
    packed = call(aten.cat.default, list(local), last)
    gathered = call(torch.ops.xdit_compile.all_gather.default, packed, last, [2] * parts, context.local.group(name))
    context.ledger.sent("all_gather", "norm statistics", 2 * rows * (parts - 1), dtype)
    means, squares = (call(aten.slice.Tensor, gathered, last, column, 2 * parts, 2) for column in range(2))
    weights = context.local.constant(torch.tensor(counts, dtype=dtype))
    mean = call(aten.sum.dim_IntList, call(aten.mul.Tensor, means, weights), [last], True)
    mean = call(aten.div.Scalar, mean, total)
    apart = call(aten.sub.Tensor, means, mean)
    apart = call(aten.mul.Tensor, call(aten.mul.Tensor, apart, apart), weights)
    summed = call(aten.sum.dim_IntList, call(aten.add.Tensor, squares, apart), [last], True)
    return mean, call(aten.div.Scalar, summed, total)


def moments(call: Callable[..., fx.Node], inputs: fx.Node, dims: list[int], count: int) -> tuple[fx.Node, fx.Node]:
    """Mean and sum of squared deviations over trailing ``dims``, which are kept with size 1.

    Args:
        call: adds a call to a graph, as `LocalGraph.call`.
        inputs: of the dtype of the statistics.
        count: how many positions ``dims`` have together; none is legal, and gives zeros.
    """
    if count == 0:
        none = call(aten.sum.dim_IntList, inputs, dims, True)
        return none, none
    pair = call(aten.var_mean.correction, inputs, dims, correction=0, keepdim=True)
    variance, mean = (call(operator.getitem, pair, position) for position in range(2))
    return mean, call(aten.mul.Scalar, variance, count)


def moments_in_pieces(
    call: Callable[..., fx.Node], inputs: fx.Node, count: int, dtype: torch.dtype, wide: torch.dtype, pieces: int
) -> tuple[fx.Node, fx.Node]:
    """The same over the last of three dims, a piece of it at a time where ``inputs`` must be copied into ``wide``.

    Args:
        inputs: [batch, groups, count] of ``dtype``.
        pieces: how many; each is copied by itself, and its statistics join those before.

    Returns:
        Mean and sum of squared deviations, [batch, groups, 1] of ``wide``.
    """
    if dtype == wide:
        return moments(call, inputs, [2], count)
    bounds = sorted({count * piece // pieces for piece in range(pieces + 1)})
    mean = squares = None
    for start, stop in zip(bounds, bounds[1:] or bounds, strict=False):
        piece = inputs if stop - start == count else call(aten.slice.Tensor, inputs, 2, start, stop)
        of_piece = moments(call, call(aten._to_copy.default, piece, dtype=wide), [2], stop - start)
        if mean is None or squares is None:
            mean, squares = of_piece
            continue
        apart = call(aten.sub.Tensor, of_piece[0], mean)
        mean = call(aten.add.Tensor, mean, call(aten.mul.Scalar, apart, (stop - start) / stop))
        apart = call(aten.mul.Scalar, call(aten.mul.Tensor, apart, apart), start * (stop - start) / stop)
        squares = call(aten.add.Tensor, call(aten.add.Tensor, squares, of_piece[1]), apart)
    assert mean is not None and squares is not None
    return mean, squares


def _cast(context: LoweringContext, value: fx.Node, dtype: torch.dtype, wanted: torch.dtype) -> fx.Node:
    return value if dtype == wanted else context.local.call(aten._to_copy.default, value, dtype=wanted)
