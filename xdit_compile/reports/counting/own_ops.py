"""What operators that inductor calls but does not know do inside: products, floating-point work, bytes of memory.

Inductor sees what they are given and what they make. Each loads and stores more than that where it goes over something
twice, and all of it counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch._inductor import ir

from xdit_compile.kernels.collectives.row_exchange import RowExchange, count, row_of


@dataclasses.dataclass(frozen=True)
class Inside:
    """What one call does; `again` are bytes that it moves beside its operands and its result."""

    products: int
    flops: int
    again: int = 0


def written_in_triton(kernel: Any) -> int:
    """Bytes that a kernel of ours loads and stores; what the rows of one tile have in common is loaded once for each.

    Raises:
        NotImplementedError: a kernel that nobody said this of.
    """
    name = kernel.get_kernel_and_metadata()[0].fn.__name__
    if name not in KERNELS:
        raise NotImplementedError(f"nobody said what {name} loads and stores")
    return KERNELS[name](kernel.kernel_args)


def _norm_rope(args: Mapping[str, Any]) -> int:
    """`xdit_compile.kernels.norm_rope`: parts and results once, tables and weights once for each tile and token."""
    lines = args["LINES"]
    counts = [int(args["tokens0"]), int(args["tokens1"])]
    batch, heads, width, item = int(args["batch"]), args["HEADS"], args["WIDTH"], args["x0"].get_dtype().itemsize
    splits = heads * width // args["VALUES"]
    moved = 2 * (lines + args["PLAIN"]) * batch * sum(counts) * heads * width * item
    for turns, tokens in zip((args["TURNS0"], args["TURNS1"]), counts, strict=True):
        tiles = -(-batch * tokens * splits // args["ROWS"])
        inner = sum(tile * args["ROWS"] % splits != 0 for tile in range(1, tiles))
        moved += lines * (batch * tokens + inner) * turns * sum(_row(args[name]) for name in ("cos", "sin"))
        affine = [name for name, there in (("weight0", args["WEIGHTED"]), ("bias0", args["BIASED"])) if there]
        moved += lines * tiles * sum(args["VALUES"] * args[name].get_dtype().itemsize for name in affine)
    return moved


def _row(table: Any) -> int:
    return int(table.get_size()[-1]) * int(table.get_dtype().itemsize)


KERNELS = {"_norm_rope_kernel": _norm_rope}
"""What kernels load and store, by their names, from their arguments."""


def some_rows(kernel: Any) -> int | None:
    """Bytes that an operator moves that is given whole tensors and touches some of their rows; None for any other."""
    name = str(getattr(kernel, "op_overload", ""))
    if name.startswith("xdit_compile.put_rows"):
        return 2 * _bytes(kernel.inputs[1])
    if name.startswith("xdit_compile.halo_start"):
        x, *rows = kernel.unflatten_args(kernel.inputs, kernel.constant_args)[0]
        exchange, shape = RowExchange.of(*rows), _sizes(x)
        received = count(exchange.got) * row_of(shape, exchange.dim)
        return int((2 * exchange.elements_sent(shape) + received) * x.get_dtype().itemsize)
    return None


def inside(kernel: Any) -> Inside | None:
    """What an operator does inside; None for one of inductor's own or of PyTorch's that it knows."""
    if isinstance(kernel, ir.UserDefinedTritonKernel):
        return Inside(0, 0)
    name = str(getattr(kernel, "op_overload", ""))
    if name.startswith("aten._addmm_activation"):
        _, rows, weight = (_sizes(each) for each in kernel.inputs[:3])
        return Inside(1, 2 * math.prod(rows) * weight[-1])
    if name.startswith("xdit_compile.linear_of_parts"):
        *parts, weight = [_sizes(each) for each in kernel.inputs if len(_sizes(each)) > 1]
        count = math.prod(parts[0][:-1])
        result = count * weight[0] * kernel.inputs[0].get_dtype().itemsize
        return Inside(len(parts), 2 * count * math.prod(weight), 2 * (len(parts) - 1) * result)
    return None


def _bytes(value: Any) -> int:
    return int(math.prod(_sizes(value)) * value.get_dtype().itemsize)


def _sizes(value: Any) -> Sequence[int]:
    return [int(size) for size in value.get_size()]
