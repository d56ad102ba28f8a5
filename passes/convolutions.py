"""Rules of operators that look at neighbours: convolutions and upsampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xdit_compile.axes import Conflict, Product

from .rules import Rule, RuleBook, type_opaquely

BOOK = RuleBook()


def _per_dim(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


@BOOK.rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(rule: Rule) -> None:
    rank = len(rule.actual[1]) - 2
    if len(rule.actual[0]) != len(rule.actual[1]):
        type_opaquely(rule, "a convolution without a batch dim")
        return
    general = "convolution" in str(rule.node.target)
    if isinstance(rule.arg(4, "padding", 0), str) or (general and rule.arg(6, "transposed")):
        _opaque_space(rule, range(rank), "padding by name or a transposed convolution")
        _channels(rule, 0)
        return
    stride, padding = _per_dim(rule.arg(3, "stride", 1), rank), _per_dim(rule.arg(4, "padding", 0), rank)
    dilation = _per_dim(rule.arg(5, "dilation", 1), rank)
    groups = rule.arg(8, "groups", 1) if general else rule.arg(6, "groups", 1)
    _channels(rule, groups)
    kernel = rule.shape(1)[2:]
    for k in range(rank):
        _space(rule, k + 2, kernel[k], stride[k], padding[k], dilation[k])
    rule.facts["convolution"] = {
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


def _channels(rule: Rule, groups: int) -> None:
    bias = [(2, 0)] if len(rule.operands) > 2 else []
    rule.bias = 2 if bias else None
    rule.loop("map", [(0, 0)], [(0, 0)])
    if groups == 1:
        rule.loop("sum", [(0, 1), (1, 1)], [])
        rule.loop("map", [(1, 0), *bias], [(0, 1)])
    elif groups == rule.shape(0)[1] == rule.shape(1)[0]:
        rule.loop("map", [(0, 1), (1, 0), *bias], [(0, 1)])
        rule.facts["depthwise"] = True
    else:
        rule.opaque(0, 1, "grouped channels")
        rule.opaque(1, 0, "grouped channels")


def _space(rule: Rule, dim: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    size, out = rule.shape(0)[dim], rule.out_shape()[dim]
    reach = dilation * (kernel - 1) + 1
    if reach == stride == 1 and padding == 0:
        rule.loop("map", [(0, dim)], [(0, dim)])
    elif stride == reach and dilation == 1 and padding == 0 and size % kernel == 0:
        _patches(rule, dim, kernel)
    elif stride == 1 and out == size and 0 <= padding < reach:
        rule.loop("halo", [(0, dim)], [(0, dim)])
    else:
        rule.opaque(0, dim, f"a convolution of kernel {kernel}, stride {stride} and padding {padding}")


def _patches(rule: Rule, dim: int, kernel: int) -> None:
    try:
        outer, _ = rule.system.split(rule.actual[0][dim], kernel)
    except Conflict as conflict:
        rule.opaque(0, dim, str(conflict))
        return
    rule.outs[0][dim] = outer
    rule.add_join([(0, dim)], [(0, dim)])


def _opaque_space(rule: Rule, dims: Sequence[int], reason: str) -> None:
    for k in dims:
        rule.opaque(0, k + 2, reason)


@BOOK.rule("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
           "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d")  # fmt: skip
def upsample_nearest(rule: Rule) -> None:
    rank = len(rule.actual[0])
    scales = _given_scales(rule, rank)
    for dim in range(2):
        rule.loop("map", [(0, dim)], [(0, dim)])
    for dim in range(2, rank):
        size, out = rule.shape(0)[dim], rule.out_shape()[dim]
        if size == out:
            rule.loop("map", [(0, dim)], [(0, dim)])
        elif out % size == 0 and scales.get(dim, out // size) == out // size:
            rule.outs[0][dim] = Product((rule.actual[0][dim], rule.system.atom(out // size)))
            rule.add_join([(0, dim)], [(0, dim)])
        else:
            rule.opaque(0, dim, f"resized from {size} to {out}")
    if rule.arg(1, "output_size") is not None:
        rule.emit = lambda ctx: ctx.call(
            ctx.node.target, ctx.operand(0), ctx.out_sizes(0)[2:], *ctx.node.args[2:], **ctx.node.kwargs
        )


def _given_scales(rule: Rule, rank: int) -> dict[int, float]:
    """The factors by which dims are scaled where the call names them: positions follow from them, not from sizes."""
    given = [rule.named("scale_factors")] if rule.named("scale_factors") else []
    factors = given[0] if given else [rule.named(name) for name in ("scales_d", "scales_h", "scales_w", "scales")]
    factors = [factor for factor in factors if factor is not None]
    return {rank - len(factors) + k: factor for k, factor in enumerate(factors)}


@BOOK.rule("pixel_unshuffle")
def pixel_unshuffle(rule: Rule) -> None:
    rank, factor = len(rule.actual[0]), rule.arg(1, "downscale_factor")
    for dim in range(rank - 3):
        rule.loop("map", [(0, dim)], [(0, dim)])
    rule.loop("whole", [(0, rank - 3)], [])
    for dim in (rank - 2, rank - 1):
        _patches(rule, dim, factor)


@BOOK.rule("avg_pool2d", "avg_pool1d", "avg_pool3d", "max_pool2d")
def pool(rule: Rule) -> None:
    rank = len(rule.actual[0])
    space = {1: 1, 2: 2, 3: 3}[int(str(rule.node.target).split("d.")[0][-1])]
    kernel = _per_dim(rule.arg(1, "kernel_size"), space)
    stride = _per_dim(rule.arg(2, "stride", kernel) or kernel, space)
    padding = _per_dim(rule.arg(3, "padding", 0), space)
    for dim in range(rank - space):
        rule.loop("map", [(0, dim)], [(0, dim)])
    for k in range(space):
        dim = rank - space + k
        size, out = rule.shape(0)[dim], rule.out_shape()[dim]
        if kernel[k] == stride[k] and not padding[k] and out * kernel[k] == size:
            _patches(rule, dim, kernel[k])
        else:
            rule.opaque(0, dim, "an overlapping pool")
