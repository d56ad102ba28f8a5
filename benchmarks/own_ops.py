"""What operators that inductor calls but does not know do inside: products, floating-point work, bytes of memory.

Inductor sees what they are given and what they make. Each loads and stores more than that where it goes over something
twice, and all of it counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Inside:
    """What one call does; `again` are bytes that it moves beside its operands and its result."""

    products: int
    flops: int
    again: int = 0


def inside(kernel: Any) -> Inside | None:
    """What an operator does inside; None for one of inductor's own or of PyTorch's that it knows."""
    name = str(getattr(kernel, "op_overload", ""))
    if name.startswith("aten._addmm_activation"):
        _, rows, weight = (_sizes(each) for each in kernel.inputs[:3])
        return Inside(1, 2 * math.prod(rows) * weight[-1])
    if name.startswith("xdit_compile.linear_of_parts"):
        *parts, weight = [_sizes(each) for each in kernel.inputs if len(_sizes(each)) > 1]
        rows = math.prod(parts[0][:-1])
        result = rows * weight[0] * kernel.inputs[0].get_dtype().itemsize
        return Inside(len(parts), 2 * rows * math.prod(weight), 2 * (len(parts) - 1) * result)
    return None


def _sizes(value: Any) -> Sequence[int]:
    return [int(size) for size in value.get_size()]
