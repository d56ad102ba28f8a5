"""Which loop of an operator a mesh dimension splits, given how its operands lie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from xdit_compile.ir.axes import Axis, same
from xdit_compile.ir.sharding import Split
from xdit_compile.passes.axes.rule import Loop, OpAxes

from .local_graph import Value


@dataclasses.dataclass(frozen=True)
class ShardedLoop:
    """A loop that is split, and the dim on which it stands in each operand and result."""

    loop: Loop
    operands: dict[int, int]
    results: dict[int, int]


def required(choices: Mapping[str, ShardedLoop], operand: int) -> dict[str, int]:
    """The dim of an operand that each mesh dimension splits, once these loops are chosen."""
    return {name: choice.operands[operand] for name, choice in choices.items() if operand in choice.operands}


def yielded(choices: Mapping[str, ShardedLoop], result: int) -> dict[str, int]:
    """The dim of a result that each mesh dimension splits."""
    return {name: choice.results[result] for name, choice in choices.items() if result in choice.results}


RUNS_SPLIT = ("map", "copies", "sum", "mean", "halo")


def feasible(op_axes: OpAxes, loop: Loop, split: Split) -> ShardedLoop | None:
    """How ``loop`` looks when it is split: on exactly one dim per operand and result; None when it cannot be.

    A regrouping, copies and windows must also leave every rank what its part of the result is made of.
    """
    if loop.kind not in RUNS_SPLIT:
        return None
    operands = _dims(op_axes.operand_axes, loop.args, split)
    results = _dims(op_axes.result_axes, loop.outs, split)
    if operands is None or results is None or (loop.kind in ("map", "copies", "halo") and not results):
        return None
    if len(loop.dims_of(0)) > 1 or len(loop.outs) > 1 and loop.outs[0][0] == loop.outs[1][0]:
        if not _same_cut(op_axes, loop, split, operands[0], results[0]):
            return None
    if loop.kind == "copies" and not _together(op_axes, operands, results, split):
        return None
    if loop.kind == "halo" and not _in_order(op_axes, operands, results, split):
        return None
    if loop.kind == "map" and _takes_cuts_apart(op_axes, loop, split):
        return None
    return ShardedLoop(loop, operands, results)


def _together(op_axes: OpAxes, operands: Mapping[int, int], results: Mapping[int, int], split: Split) -> bool:
    """Whether the rank that has a position has all its copies."""
    one, copies = op_axes.operand_axes[0][operands[0]], op_axes.result_axes[0][results[0]]
    ranks = range(split.parts)
    return all(split.length(copies, rank) == copies.size * split.length(one, rank) for rank in ranks)


def _in_order(op_axes: OpAxes, operands: Mapping[int, int], results: Mapping[int, int], split: Split) -> bool:
    """Whether ranks hold neighbouring positions in rank order, before and after: then they know who has the halo."""
    read, made = op_axes.operand_axes[0][operands[0]], op_axes.result_axes[0][results[0]]
    return split.ends(read) is not None and split.ends(made) is not None


def _takes_cuts_apart(op_axes: OpAxes, loop: Loop, split: Split) -> bool:
    """Whether a loop joins or cuts a concatenation that lies by the rows of its whole, not by those of its parts."""
    axes = [op_axes.operand_axes[operand][dim] for operand, dim in loop.args] + [
        op_axes.result_axes[result][dim] for result, dim in loop.outs
    ]
    return any(split.cuts_whole(axis) for axis in axes) and any(not same(axes[0], axis) for axis in axes)


def _same_cut(op_axes: OpAxes, loop: Loop, split: Split, operand_dim: int, result_dim: int) -> bool:
    """Whether a regrouping finds on every rank, in the same order, the positions that its result should hold there."""
    before = [(op_axes.operand_axes[0][dim], dim == operand_dim) for dim in loop.dims_of(0)]
    after = [(op_axes.result_axes[0][dim], dim == result_dim) for _, dim in loop.outs]
    return all(
        np.array_equal(_flat_positions(before, split, index), _flat_positions(after, split, index))
        for index in range(split.parts)
    )


def _flat_positions(axes: Sequence[tuple[Axis, bool]], split: Split, index: int) -> np.ndarray:
    """Positions in the flattened group that a rank holds when the marked axis is split."""
    marked = next(k for k, (_, is_marked) in enumerate(axes) if is_marked)
    outer = math.prod(axis.size for axis, _ in axes[:marked])
    inner = math.prod(axis.size for axis, _ in axes[marked + 1 :])
    axis = axes[marked][0]
    grid = np.arange(outer * axis.size * inner).reshape(outer, axis.size, inner)
    return grid[:, split.positions(axis, index)].reshape(-1)


def _dims(axes: Sequence[Sequence], pairs: Sequence[tuple[int, int]], split: Split) -> dict[int, int] | None:
    split_dims: dict[int, int] = {}
    for tensor in dict.fromkeys(tensor for tensor, _ in pairs):
        dims = [dim for other, dim in pairs if other == tensor and split.splits(axes[tensor][dim])]
        if len(dims) != 1:
            return None
        split_dims[tensor] = dims[0]
    return split_dims


def choose(op_axes: OpAxes, operands: Sequence[Value], split: Split) -> ShardedLoop | None:
    """The feasible loop along which most of the operands already lies, in elements of the whole tensors.

    Where nothing lies along any it is a map, for which operands that are whole are sliced; None without such a loop.
    """
    best: ShardedLoop | None = None
    most = -1
    for loop in op_axes.loops:
        choice = feasible(op_axes, loop, split)
        if choice is None:
            continue
        lying = sum(
            math.prod(axis.size for axis in operands[operand].axes)
            for operand, dim in choice.operands.items()
            if operands[operand].split.get(split.dim) == dim
            and same(operands[operand].axes[dim], op_axes.operand_axes[operand][dim])
        )
        if lying == 0 and loop.kind != "map":
            continue
        if lying > most:
            best, most = choice, lying
    return best


def choose_all(op_axes: OpAxes, operands: Sequence[Value], splits: Mapping[str, Split]) -> dict[str, ShardedLoop]:
    """`choose` for every mesh dimension; those along which nothing is split are left out."""
    return {name: chosen for name, split in splits.items() if (chosen := choose(op_axes, operands, split)) is not None}
