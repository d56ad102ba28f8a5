"""The call of one operator on one rank, as its rule sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile.errors import PartitionError
from xdit_compile.ir.arguments import overload_of
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.axes.windows import HaloWindow

from .choose_loop import ShardedLoop, required
from .context import LoweringContext
from .local_graph import aten


class Emission:
    """What a rule sees when it calls its operator on this rank: a `LocalCall`.

    Args:
        operands: on this rank, laid out as ``choices`` want them.
        choices: the loop that each mesh dimension splits.
        outs: for each result the dim that each mesh dimension splits.
        seen: for dims of the first operand that are read by windows, the rows that are there.
    """

    aten = aten

    def __init__(
        self,
        context: LoweringContext,
        node: fx.Node,
        op_axes: OpAxes,
        operands: list[fx.Node],
        choices: Mapping[str, ShardedLoop],
        outs: list[dict[str, int]],
        seen: Mapping[int, HaloWindow],
    ):
        self.seen = seen
        self._context = context
        self.node = node
        self.op_axes = op_axes
        self._operands = operands
        self._choices = choices
        self._outs = outs

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in this rank's graph."""
        return self._context.local.call(target, *args, **kwargs)

    def constant(self, value: torch.Tensor) -> fx.Node:
        """A tensor that belongs to this rank's graph."""
        return self._context.local.constant(value)

    def take(self, node: fx.Node, dim: int, positions: np.ndarray, size: int) -> fx.Node:
        """``positions`` of a dim that has ``size`` of them on this rank, in the given order."""
        return self._context.local.take(node, dim, positions, size)

    def operand(self, operand: int) -> fx.Node:
        """An operand on this rank."""
        return self._operands[operand]

    def length(self, handle: int | None, operand: int, dim: int) -> int:
        """How many positions this rank has of an axis that the rule kept, split as ``dim`` of an operand is; 0 for no
        axis."""
        if handle is None:
            return 0
        names = [name for name, split_dim in required(self._choices, operand).items() if split_dim == dim]
        return self._context.sharding.length(self.op_axes.kept[handle], names)

    def operand_sizes(self, operand: int) -> list[int]:
        """The shape of an operand on this rank, without the rows of neighbours."""
        return self._context.sharding.sizes(self.op_axes.operand_axes[operand], required(self._choices, operand))

    def out_sizes(self, result: int) -> list[int]:
        """The shape of a result on this rank."""
        return self._context.sharding.sizes(self.op_axes.result_axes[result], self._outs[result])

    def same(self, **changed: Any) -> fx.Node:
        """The node's own call with its operands on this rank, and ``changed`` among its keyword arguments."""
        operands = iter(self._operands)
        args, kwargs = pytree.tree_map(
            lambda leaf: next(operands) if isinstance(leaf, fx.Node) else leaf, (self.node.args, dict(self.node.kwargs))
        )
        kwargs.update({name: value for name, value in changed.items() if name in kwargs})
        return self.call(self.node.target, *args, **kwargs)

    def as_captured(self) -> fx.Node:
        """The node's own call on operands that lie in memory as they did when it was captured: kernels may look."""
        self._operands = [self._laid(operand) for operand in range(len(self._operands))]
        return self.same()

    def _laid(self, operand: int) -> fx.Node:
        node, captured = self._operands[operand], self.op_axes.operands[operand].meta["val"]
        if captured.is_contiguous():
            return self.call(aten.contiguous.default, node)
        order = sorted(range(captured.dim()), key=lambda dim: -captured.stride(dim))
        if not captured.permute(order).is_contiguous():
            return node
        dense = self.call(aten.contiguous.default, self.call(aten.permute.default, node, order))
        return self.call(aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])

    def run(self, summed: Sequence[str]) -> fx.Node:
        """The operator's call on this rank; a shard without positions needs none, and many operators refuse one.

        Args:
            summed: mesh dimensions that split what is contracted, so that this rank's result is one part of a sum. It
                is made without the bias, which is added once.

        Raises:
            PartitionError: where it has a bias and nobody knows its call without one.
        """
        made = self.node.meta["val"]
        if self._operands and isinstance(made, torch.Tensor) and 0 in self.out_sizes(0):
            return self.call(aten.new_zeros.default, self.operand(0), self.out_sizes(0), dtype=made.dtype)
        kinds = {self._choices[name].loop.kind for name in summed}
        if "mean" in kinds:
            return self._mean()
        if summed and self.op_axes.bias is not None:
            return self._unbiased()
        return self.op_axes.emit(self) if self.op_axes.emit is not None else self.same()

    def _mean(self) -> fx.Node:
        """A mean over split positions is a sum of what is here over the number of all, in a range that holds it."""
        contracted = [dim for loop in self.op_axes.loops if loop.kind == "mean" for dim in loop.dims_of(0)]
        count = math.prod(self.op_axes.operand_axes[0][dim].size for dim in contracted)
        keep = len(self.op_axes.result_axes[0]) == len(self.op_axes.operand_axes[0])
        dtype = self.node.meta["val"].dtype
        wide = torch.promote_types(dtype, torch.float32)
        total = self.call(aten.sum.dim_IntList, self.operand(0), contracted, keep, dtype=wide)
        mean = self.call(aten.div.Scalar, total, count)
        return mean if wide == dtype else self.call(aten._to_copy.default, mean, dtype=dtype)

    def _unbiased(self) -> fx.Node:
        name = overload_of(self.node)._schema.name.split("::")[1]
        if name == "linear":
            return self.call(aten.linear.default, self.operand(0), self.operand(1), None)
        product = {"addmm": aten.mm.default, "baddbmm": aten.bmm.default}.get(name)
        if product is None:
            raise PartitionError(f"is {name} contracted over a split dim, which has no rule")
        return self.call(product, self.operand(1), self.operand(2))
