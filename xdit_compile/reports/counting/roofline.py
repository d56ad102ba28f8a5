"""How long a card would take at best for what inductor generated: each kernel bound by arithmetic or by memory.

The roofline of Williams, Waterman and Patterson (2009). It knows nothing of launches, of kernels that reach less than
the peak, nor of caches: a bound from below, to compare what moves less with what computes less.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode

from xdit_compile.backends.target.cards import Card

from .moved_bytes import moved_bytes
from .own_ops import inside


@dataclasses.dataclass(frozen=True)
class Work:
    """What a graph does in all, the seconds that its kernels take at best, and products that operators do inside."""

    moved: int
    flops: int
    seconds: float
    products: int

    @classmethod
    def of(cls, nodes: Sequence[BaseSchedulerNode], card: Card) -> Work:
        """Of the nodes of inductor's scheduler, each of which becomes a kernel."""
        insides = [inside(node.node) if isinstance(node, ExternKernelSchedulerNode) else None for node in nodes]
        each = [
            (_flops(node), moved_bytes(node)) if op is None else (op.flops, moved_bytes(node) + op.again)
            for node, op in zip(nodes, insides, strict=True)
        ]
        flops, moved = sum(work for work, _ in each), sum(size for _, size in each)
        products = sum(op.products for op in insides if op is not None)
        return cls(moved, flops, sum(card.seconds(*one) for one in each), products)


def _flops(node: BaseSchedulerNode) -> int:
    """Of products, convolutions and attention; what else kernels compute is bound by memory.

    Inductor does not know its own convolutions any more once it has taken their bias out.
    """
    if not isinstance(node, ExternKernelSchedulerNode):
        return 0
    if "flash_attention" in str(getattr(node.node, "python_kernel_name", "")):
        query, key, value = (list(map(int, each.get_size())) for each in _tensors(node.node)[:3])
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if str(getattr(node.node, "op_overload", "")).startswith("aten.convolution"):
        convolution: Any = node.node
        result, weight = ([int(size) for size in each.get_size()] for each in (convolution, convolution.inputs[1]))
        return 2 * math.prod(result) * math.prod(weight[1:])
    return node.estimate_flops() or 0


def _tensors(kernel: Any) -> list[Any]:
    return [each for each in kernel.inputs if hasattr(each, "get_size")]
