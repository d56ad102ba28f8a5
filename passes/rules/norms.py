"""Rules of operators that relate every position of a dim to the others: norms, softmax, sorting, Fourier transforms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from xdit_compile.ir.axes import Atom, resolve
from xdit_compile.passes.axes.operators import NormOp
from xdit_compile.passes.axes.rule import Kind, Rule, RuleBook

BOOK = RuleBook()


def _over(rule: Rule, whole: set[int], kind: Kind = "whole") -> None:
    """Dims in ``whole`` are needed in full and kept; the others are looped over."""
    for dim in range(len(rule.actual[0])):
        outs = [(k, dim) for k in range(len(rule.result_axes)) if len(rule.result_axes[k]) == len(rule.actual[0])]
        rule.loop(kind if dim in whole else "map", [(0, dim)], outs)


@BOOK.rule("layer_norm", "rms_norm", "_fused_rms_norm", "native_layer_norm")
def trailing_norm(rule: Rule) -> None:
    """A map over leading dims; those that are normalised are needed whole, unless a lowering joins statistics."""
    rule.operator = _affine(rule)
    rank, count = len(rule.actual[0]), len(rule.arg(1, "normalized_shape"))
    for dim in range(rank - count):
        rule.loop("map", [(0, dim)], [(result, dim) for result in range(len(rule.result_axes))])
    for dim in range(rank - count, rank):
        scales = [(operand, dim - (rank - count)) for operand in range(1, len(rule.operands))]
        rule.loop("whole", [(0, dim), *scales], [(0, dim)])


def _affine(rule: Rule) -> NormOp:
    """Which operands are the weight and the bias: either may be there without the other."""
    there = [name for name in ("weight", "bias") if isinstance(rule.named(name), fx.Node)]
    weight, bias = (there.index(name) + 1 if name in there else None for name in ("weight", "bias"))
    return NormOp(weight, bias)


@BOOK.rule("group_norm")
def group_norm(rule: Rule) -> None:
    """A map over batch, ``stats`` over space; channels are needed whole, unless a lowering finds whole groups."""
    rule.operator = _affine(rule)
    rank = len(rule.actual[0])
    _grouped(rule, rule.shape(0)[1] // rule.arg(1, "num_groups"))
    rule.loop("map", [(0, 0)], [(0, 0)])
    rule.loop("whole", [(operand, 1 if operand == 0 else 0) for operand in range(len(rule.operands))], [(0, 1)])
    for dim in range(2, rank):
        rule.loop("stats", [(0, dim)], [(0, dim)])


def _grouped(rule: Rule, size: int) -> None:
    """Make channels of which nothing else is known a product of groups and what is in one."""
    channels = resolve(rule.actual[0][1])
    if isinstance(channels, Atom) and 1 < size < channels.size:
        rule.system.split(channels, size)


@BOOK.rule(
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort", "_safe_softmax"
)
def along(rule: Rule) -> None:
    """The one dim along which positions are related is needed whole and keeps its axis; a map over the others."""
    dim = rule.arg(1, "dim", -1)
    _over(rule, {rule.wrapped(dim)})


@BOOK.rule("topk")
def topk(rule: Rule) -> None:
    """The one dim of which the largest are taken is needed whole and has a fresh axis then; a map over the others."""
    rank = len(rule.actual[0])
    chosen = rule.wrapped(rule.arg(2, "dim", -1))
    for dim in range(rank):
        if dim == chosen:
            rule.loop("whole", [(0, dim)], [])
        else:
            rule.loop("map", [(0, dim)], [(0, dim), (1, dim)])


_FOURIER = [
    f"fft_{name}{dims}" for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft") for dims in ("", "2", "n")
]


@BOOK.rule(*_FOURIER, "fft_fftshift", "fft_ifftshift", "_fft_c2c", "_fft_r2c", "_fft_c2r")
def fourier(rule: Rule) -> None:
    """Of dims that are transformed every position is needed, and frequencies are no positions."""
    transformed = {rule.wrapped(dim) for dim in _transformed(rule)}
    for dim in range(len(rule.actual[0])):
        if dim in transformed:
            rule.loop("whole", [(0, dim)], [])
        else:
            rule.loop("map", [(0, dim)], [(0, dim)])


def _transformed(rule: Rule) -> Sequence[int]:
    """The dims of a Fourier transform; where it names none those of its kind: the last, the last two, or all."""
    dims, sizes, name = rule.named("dim"), rule.named("s"), rule.name
    if dims is not None:
        return [dims] if isinstance(dims, int) else dims
    if name.endswith(("fft", "fft2")):
        return range(-2 if name.endswith("2") else -1, 0)
    return range(-len(sizes) if sizes else -len(rule.actual[0]), 0)
