"""Rules of operators that join tensors along a dim or cut them apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from xdit_compile.ir.axes import Axis, Concat, Conflict
from xdit_compile.passes.axes.local_call import LocalCall
from xdit_compile.passes.axes.rule import Rule, RuleBook
from xdit_compile.passes.axes.windows import Windows
from xdit_compile.passes.local.halo import moved

BOOK = RuleBook()
MOST_CUTS = 12
"""An axis cut at more places than this is taken apart step by step and has no parts worth a name."""


def _others(rule: Rule, dim: int, operands: range, result: int = 0) -> None:
    """Every dim but ``dim`` is one axis in all operands and in the result."""
    for other in range(len(rule.actual[0])):
        if other != dim:
            rule.loop("map", [(operand, other) for operand in operands], [(result, other)])


@BOOK.rule("cat", "concat", "concatenate")
def cat(rule: Rule) -> None:
    """A map over every dim; that along which tensors are joined is a concatenation of theirs."""
    rank = len(rule.out_shape())
    dim = rule.arg(1, "dim", 0) % rank
    joined = [operand for operand, axes in enumerate(rule.actual) if len(axes) == rank]
    for other in range(rank):
        if other != dim:
            rule.loop("map", [(operand, other) for operand in joined], [(0, other)])
    filled = [operand for operand in joined if rule.shape(operand)[dim]]
    parts = [rule.actual[operand][dim] for operand in filled]
    rule.result_axes[0][dim] = Concat(parts) if len(parts) != 1 else parts[0]
    rule.add_join([(operand, dim) for operand in filled], [(0, dim)])
    if len(filled) < len(rule.operands) and filled:
        rule.emit = lambda ctx: ctx.call(ctx.aten.cat.default, [ctx.operand(operand) for operand in filled], dim)


@BOOK.rule("stack")
def stack(rule: Rule) -> None:
    rank = len(rule.out_shape())
    new = rule.arg(1, "dim", 0) % rank
    for dim in range(rank - 1):
        rule.loop("map", [(operand, dim) for operand in range(len(rule.operands))], [(0, dim + (dim >= new))])


def _cut_places(node: fx.Node, dim: int) -> int:
    """At how many places the slices of ``node`` along ``dim`` cut it."""
    places: set[Any] = set()
    for user in node.users:
        if "slice" in str(user.target) and (user.args[1] if len(user.args) > 1 else 0) == dim:
            places.update(user.args[2:4])
    return len(places)


@BOOK.rule("slice", "narrow")
def slice_(rule: Rule) -> None:
    """A map over the other dims; of the sliced one a part of its axis, its outer factor, or rows picked by windows."""
    shape = rule.shape(0)
    dim = rule.arg(1, "dim", 0) % len(shape)
    _others(rule, dim, range(1))
    size = shape[dim]
    start, step = _bounded(rule.arg(2, "start"), size, 0), rule.arg(4, "step", 1)
    length = rule.out_shape()[dim]
    if step == 1:
        cut_out(rule, dim, start, length)
    elif size % step == 0 and length == size // step:
        _every(rule, dim, start, step)
    else:
        _pick(rule, dim, start + step * np.arange(length))


def _bounded(value: Any, size: int, default: int) -> int:
    if value is None:
        return default
    return max(0, min(size, value + size if value < 0 else value))


def cut_out(rule: Rule, dim: int, start: int, length: int) -> None:
    """Type a cut of the positions ``start`` to ``start + length`` out of one dim of the first operand.

    Windows of one row pick them; where the axis can be cut they keep their part of it. Those of a table, or of an axis
    that is cut at very many places, are needed whole.
    """
    axis = rule.actual[0][dim]
    if length == axis.size:
        rule.loop("map", [(0, dim)], [(0, dim)])
        rule.emit = lambda ctx: ctx.operand(0)
        return
    if _cut_places(rule.operands[0], dim) > MOST_CUTS:
        rule.opaque(0, dim, "cut into single steps")
        return
    if length == 0 or rule.is_table(0):
        rule.loop("whole", [(0, dim)], [])
        return
    try:
        kept = rule.system.segment(axis, start, start + length)
        before = rule.system.segment(axis, 0, start) if start else None
    except Conflict:
        _pick(rule, dim, np.arange(start, start + length))
        return
    rule.add_join([(0, dim)], [(0, dim)])
    rule.look(dim, Windows.moved(np.arange(start, start + length), axis.size), kept)

    handle = rule.keep(before)

    def emit(ctx: LocalCall) -> fx.Node:
        if dim in ctx.seen:
            return moved(ctx)
        begin = ctx.length(handle, 0, dim)
        return ctx.call(ctx.aten.slice.Tensor, ctx.operand(0), dim, begin, begin + ctx.out_sizes(0)[dim])

    rule.emit = emit


def _pick(rule: Rule, dim: int, positions: np.ndarray) -> None:
    """Positions that are no part of the axis with a name of its own."""
    rule.look(dim, Windows.moved(positions, rule.shape(0)[dim]))
    rule.emit = lambda ctx: moved(ctx) if dim in ctx.seen else ctx.same()


def _every(rule: Rule, dim: int, start: int, step: int) -> None:
    try:
        outer, _ = rule.system.split(rule.actual[0][dim], step)
    except Conflict:
        _pick(rule, dim, np.arange(start, rule.shape(0)[dim], step))
        return
    rule.result_axes[0][dim] = outer
    rule.add_join([(0, dim)], [(0, dim)])
    rule.emit = lambda ctx: ctx.call(ctx.aten.slice.Tensor, ctx.operand(0), dim, start, 2**63 - 1, step)


@BOOK.rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(rule: Rule) -> None:
    """A map over every dim; the axis of the one that is split is cut, each result has a part."""
    rank = len(rule.actual[0])
    dim = rule.arg(2, "dim", 0) % rank
    count = len(rule.result_axes)
    sizes = [rule.out_shape(k)[dim] for k in range(count)]
    for other in range(rank):
        if other != dim:
            rule.loop("map", [(0, other)], [(k, other) for k in range(count)])
    axis = rule.actual[0][dim]
    if count == 1:
        rule.loop("map", [(0, dim)], [(0, dim)])
    elif count > MOST_CUTS or 0 in sizes or set(sizes) == {1}:
        rule.loop("whole", [(0, dim)], [])
        return
    else:
        mark = rule.system.mark()
        try:
            ends = [sum(sizes[: k + 1]) for k in range(count)]
            parts = [rule.system.segment(axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]
        except Conflict as conflict:
            rule.system.rollback(mark)
            rule.opaque(0, dim, str(conflict))
            return
        for k, part in enumerate(parts):
            rule.result_axes[k][dim] = part
        rule.add_join([(0, dim)], [(k, dim) for k in range(count)])
    rule.emit = lambda ctx: ctx.call(
        ctx.aten.split_with_sizes.default, ctx.operand(0), [ctx.out_sizes(k)[dim] for k in range(count)], dim
    )


@BOOK.rule("unbind")
def unbind(rule: Rule) -> None:
    """A map over the other dims, with one result for each position; the one that goes is needed whole."""
    gone = rule.arg(1, "dim", 0) % len(rule.actual[0])
    _take_one(rule, gone, len(rule.result_axes))


@BOOK.rule("select")
def select(rule: Rule) -> None:
    """A map over the other dims; the one that goes is needed whole."""
    gone = rule.arg(1, "dim") % len(rule.actual[0])
    _take_one(rule, gone, 1)


def _take_one(rule: Rule, gone: int, results: int) -> None:
    for dim in range(len(rule.actual[0])):
        if dim != gone:
            rule.loop("map", [(0, dim)], [(k, dim - (dim > gone)) for k in range(results)])
    rule.loop("whole", [(0, gone)], [])


@BOOK.rule("slice_scatter")
def slice_scatter(rule: Rule) -> None:
    """A map over every dim; the source's axis is the part of the operand's that it takes the place of."""
    shape, source = rule.shape(0), rule.shape(1)
    dim = rule.arg(2, "dim", 0) % len(shape)
    _others(rule, dim, range(2))
    start, step = _bounded(rule.arg(3, "start"), shape[dim], 0), rule.arg(5, "step", 1)
    length, axis = source[dim], rule.actual[0][dim]
    if length == shape[dim]:
        rule.loop("map", [(0, dim), (1, dim)], [(0, dim)])
        rule.emit = lambda ctx: ctx.call(ctx.aten.clone.default, ctx.operand(1))
        return
    try:
        if step != 1:
            outer, _ = rule.system.split(axis, step)
            rule.system.unify(outer, rule.actual[1][dim])
            begin: Axis | None = None
        else:
            rule.system.unify(rule.system.segment(axis, start, start + length), rule.actual[1][dim])
            begin = rule.system.segment(axis, 0, start) if start else None
    except Conflict as conflict:
        rule.opaque(0, dim, str(conflict))
        rule.opaque(1, dim, str(conflict))
        return
    rule.result_axes[0][dim] = axis
    rule.add_join([(0, dim), (1, dim)], [(0, dim)])

    handle = rule.keep(begin)

    def emit(ctx: LocalCall) -> fx.Node:
        if step != 1:
            return ctx.call(ctx.node.target, ctx.operand(0), ctx.operand(1), dim, start, 2**63 - 1, step)
        first = ctx.length(handle, 0, dim)
        stop = first + ctx.operand_sizes(1)[dim]
        return ctx.call(ctx.node.target, ctx.operand(0), ctx.operand(1), dim, first, stop)

    rule.emit = emit


@BOOK.rule("select_scatter")
def select_scatter(rule: Rule) -> None:
    """A map over the other dims; the one that the source does not have is needed whole."""
    gone = rule.arg(2, "dim") % len(rule.actual[0])
    for dim in range(len(rule.actual[0])):
        if dim != gone:
            rule.loop("map", [(0, dim), (1, dim - (dim > gone))], [(0, dim)])
    rule.loop("whole", [(0, gone)], [(0, gone)])


@BOOK.rule("flip", "roll")
def disorder(rule: Rule) -> None:
    """Dims that are turned about are needed whole and have a fresh axis then; a map over the others."""
    moved = rule.arg(1, "dims") if "flip" in str(rule.node.target) else rule.arg(2, "dims", [])
    rank = len(rule.actual[0])
    moved = {rule.wrapped(dim) for dim in ([moved] if isinstance(moved, int) else moved)} or set(range(rank))
    for dim in range(rank):
        if dim in moved:
            rule.opaque(0, dim, "positions change their order")
        else:
            rule.loop("map", [(0, dim)], [(0, dim)])


@BOOK.rule("pad_sequence")
def pad_sequence(rule: Rule) -> None:
    """Sequences of one length are stacked; ragged ones share no token axis."""
    batch_first = bool(rule.arg(1, "batch_first", False))
    lengths = {rule.shape(operand)[0] for operand in range(len(rule.operands))}
    first, tokens = (0, 1) if batch_first else (1, 0)
    for dim in range(1, len(rule.actual[0])):
        rule.loop("map", [(operand, dim) for operand in range(len(rule.operands))], [(0, dim + 1)])
    if len(lengths) > 1:
        for operand in range(len(rule.operands)):
            rule.opaque(operand, 0, "sequences of different lengths")
        return
    operands = range(len(rule.operands))
    rule.loop("map", [(operand, 0) for operand in operands], [(0, tokens)])
    rule.emit = lambda ctx: ctx.call(ctx.aten.stack.default, [ctx.operand(operand) for operand in operands], first)
