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
    """What a rule sees when it calls its operator on this rank."""

    aten = aten

    def __init__(
        self,
        partitioner: LoweringContext,
        node: fx.Node,
        op_axes: OpAxes,
        operands: list[fx.Node],
        choices: Mapping[str, ShardedLoop],
        outs: list[dict[str, int]],
        seen: Mapping[int, HaloWindow],
    ):
        self.seen = seen
        self._partitioner = partitioner
        self.node = node
        self.op_axes = op_axes
        self._operands = operands
        self._choices = choices
        self._outs = outs

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._partitioner.local.call(target, *args, **kwargs)

    def constant(self, value: torch.Tensor) -> fx.Node:
        """A tensor that belongs to the rewritten graph."""
        return self._partitioner.local.constant(value)

    def take(self, node: fx.Node, dim: int, positions: np.ndarray, size: int) -> fx.Node:
        """Positions of one dim of ``size``, in the given order."""
        return self._partitioner.local.take(node, dim, positions, size)

    def operand(self, index: int) -> fx.Node:
        return self._operands[index]

    def length(self, handle: int | None, operand: int, dim: int) -> int:
        """Local positions of an axis that the rule kept, split as ``dim`` of an operand is; 0 for none."""
        if handle is None:
            return 0
        names = [name for name, own in required(self._choices, operand).items() if own == dim]
        return self._partitioner.sharding.length(self.op_axes.kept[handle], names)

    def operand_sizes(self, index: int) -> list[int]:
        return self._partitioner.sharding.sizes(self.op_axes.operand_axes[index], required(self._choices, index))

    def out_sizes(self, result: int) -> list[int]:
        """The local shape of a result."""
        return self._partitioner.sharding.sizes(self.op_axes.result_axes[result], self._outs[result])

    def same(self, **changed: Any) -> fx.Node:
        """The node's own call with its operands on this rank."""
        operands = iter(self._operands)
        args, kwargs = pytree.tree_map(
            lambda leaf: next(operands) if isinstance(leaf, fx.Node) else leaf, (self.node.args, dict(self.node.kwargs))
        )
        kwargs.update({name: value for name, value in changed.items() if name in kwargs})
        return self.call(self.node.target, *args, **kwargs)

    def as_captured(self) -> fx.Node:
        """The node's own call on operands that lie in memory as they did when it was captured: kernels may look."""
        self._operands = [self._laid(at) for at in range(len(self._operands))]
        return self.same()

    def _laid(self, at: int) -> fx.Node:
        node, captured = self._operands[at], self.op_axes.operands[at].meta["val"]
        if captured.is_contiguous():
            return self.call(aten.contiguous.default, node)
        order = sorted(range(captured.dim()), key=lambda dim: -captured.stride(dim))
        if not captured.permute(order).is_contiguous():
            return node
        dense = self.call(aten.contiguous.default, self.call(aten.permute.default, node, order))
        return self.call(aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])

    def run(self, summed: Sequence[str]) -> fx.Node:
        """The operator's call on this rank; a shard without positions needs none, and many operators refuse one."""
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
