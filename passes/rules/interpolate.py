"""Rules of operators that resize: nearest and linear interpolation, pixel shuffle."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from xdit_compile.ir.arguments import overload_of
from xdit_compile.ir.axes import Product
from xdit_compile.passes.axes.local_call import LocalCall
from xdit_compile.passes.axes.rule import Rule, RuleBook, operator_name
from xdit_compile.passes.axes.windows import Windows
from xdit_compile.passes.local.halo import moved
from xdit_compile.passes.local.local_graph import aten

from .convolution import patches

BOOK = RuleBook()


@BOOK.rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
           "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")  # fmt: skip
def nearest(rule: Rule) -> None:
    """Whole multiples keep the axis as a factor; elsewhere every row says which one it copies."""
    rank = len(rule.actual[0])
    scales = _given_scales(rule, rank)
    _leading(rule)
    for dim in range(2, rank):
        size, out = rule.shape(0)[dim], rule.out_shape()[dim]
        if size == out and scales.get(dim, 1) == 1:
            rule.loop("map", [(0, dim)], [(0, dim)])
        elif out % size == 0 and scales.get(dim, out // size) == out // size:
            rule.result_axes[0][dim] = Product((rule.actual[0][dim], rule.system.atom(out // size)))
            rule.add_join([(0, dim)], [(0, dim)])
        else:
            rule.look(dim, Windows.moved(_copied(rule, dim, scales.get(dim)), size))
    rule.emit = lambda ctx: _resize(ctx, moved(ctx), scales)


def _copied(rule: Rule, dim: int, scale: float | None) -> np.ndarray:
    """The row that each row of the result copies. The operator itself says it: kernels for one, two and three dims and
    for different devices round in different ways where a factor is near two."""
    value = rule.node.meta["val"]
    rank, size, out = value.dim(), rule.shape(0)[dim], rule.out_shape()[dim]
    device = value.device if value.device.type == "cuda" and torch.cuda.is_available() else "cpu"
    sizes: list[int] = [1] * (rank - 2)
    scales: list[float | None] = [None] * (rank - 2)
    sizes[dim - 2], scales[dim - 2] = out, scale
    rows = torch.arange(size, dtype=torch.float32, device=device).view(*[1] * dim, -1, *[1] * (rank - 1 - dim))
    copied = getattr(aten, rule.name).default(rows, sizes, *scales)
    return copied.flatten().long().cpu().numpy()


@BOOK.rule("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d")
def linear(rule: Rule) -> None:
    """Every row is a mixture of two, its window; one dim at a time, as the weights are products."""
    rank, corners = len(rule.actual[0]), bool(rule.named("align_corners"))
    scales = _given_scales(rule, rank)
    _leading(rule)
    shares: dict[int, np.ndarray] = {}
    for dim in range(2, rank):
        size, out = rule.shape(0)[dim], rule.out_shape()[dim]
        if size == out and scales.get(dim, 1) == 1:
            rule.loop("map", [(0, dim)], [(0, dim)])
            continue
        places = _places(size, out, scales.get(dim), corners)
        lower = np.floor(places).astype(np.int64)
        shares[dim] = places - lower
        rule.look(dim, Windows(lower, np.minimum(lower + 1, size - 1), places, size))

    def emit(ctx: LocalCall) -> fx.Node:
        node = ctx.operand(0)
        for dim, seen in ctx.seen.items():
            rows = slice(seen.first, seen.last)
            taken = [
                ctx.take(node, dim, windows[rows] - seen.start, seen.stop - seen.start)
                for windows in (seen.windows.first, seen.windows.last)
            ]
            share = torch.from_numpy(shares[dim][rows]).to(ctx.node.meta["val"].dtype)
            weight = ctx.constant(share.reshape(-1, *[1] * (rank - 1 - dim)))
            node = ctx.call(aten.lerp.Tensor, *taken, weight)
        return _resize(ctx, node, scales, corners)

    rule.emit = emit


def _places(size: int, out: int, scale: float | None, corners: bool) -> np.ndarray:
    """Where each row of the result lies among the rows of the operand, in the precision in which PyTorch finds it."""
    rows = np.arange(out, dtype=np.float32)
    if corners:
        return np.minimum(rows * np.float32((size - 1) / max(out - 1, 1)), size - 1)
    step = np.float32(1 / scale if scale else size / out)
    return np.clip((rows + np.float32(0.5)) * step - np.float32(0.5), 0, size - 1)


def _leading(rule: Rule) -> None:
    for dim in range(2):
        rule.loop("map", [(0, dim)], [(0, dim)])


def _resize(ctx: LocalCall, node: fx.Node, scales: dict[int, float], *corners: bool) -> fx.Node:
    """The operator over the dims that are whole on this rank; the others have their size already."""
    sizes, held = ctx.out_sizes(0), ctx.operand_sizes(0)
    rank = len(sizes)
    if all(dim in ctx.seen or sizes[dim] == held[dim] and scales.get(dim, 1) == 1 for dim in range(2, rank)):
        return node
    left = [None if dim in ctx.seen else scales.get(dim) for dim in range(2, rank)]
    op = getattr(aten, operator_name(overload_of(ctx.node))).default
    return ctx.call(op, node, sizes[2:], *corners, *left)


def _given_scales(rule: Rule, rank: int) -> dict[int, float]:
    """The factors by which dims are scaled where the call names them: positions follow from them, not from sizes."""
    names = ("scales_d", "scales_h", "scales_w", "scales")
    factors = rule.named("scale_factors") or [rule.named(name) for name in names]
    factors = [factor for factor in factors if factor is not None]
    return {rank - len(factors) + k: factor for k, factor in enumerate(factors)}


@BOOK.rule("pixel_unshuffle")
def pixel_unshuffle(rule: Rule) -> None:
    """Rows and columns keep their outer factor; the inner one goes to channels, which are needed whole."""
    rank, factor = len(rule.actual[0]), rule.arg(1, "downscale_factor")
    for dim in range(rank - 3):
        rule.loop("map", [(0, dim)], [(0, dim)])
    rule.loop("whole", [(0, rank - 3)], [])
    for dim in (rank - 2, rank - 1):
        patches(rule, dim, factor)


@BOOK.rule("pixel_shuffle")
def pixel_shuffle(rule: Rule) -> None:
    """Rows and columns become outer factors; the inner ones come from channels, which are needed whole."""
    factor = rule.arg(1, "upscale_factor")
    rank = len(rule.actual[0])
    for dim in range(rank - 3):
        rule.loop("map", [(0, dim)], [(0, dim)])
    rule.opaque(0, rank - 3, "channels become positions")
    for dim in (rank - 2, rank - 1):
        rule.add_join([(0, dim)], [(0, dim)])
        rule.result_axes[0][dim] = Product((rule.actual[0][dim], rule.system.atom(factor)))
