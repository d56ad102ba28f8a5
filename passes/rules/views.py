"""Rules of operators that move dims about: reshape, permute, expand, repeat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.errors import PartitionError
from xdit_compile.ir.arguments import overload_of
from xdit_compile.ir.axes import Concat, Conflict, Product, resolve
from xdit_compile.passes.axes.local_call import LocalCall
from xdit_compile.passes.axes.rule import Rule, RuleBook, type_opaquely

BOOK = RuleBook()


def aligned_segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """The finest groups of neighbouring dims of two shapes that hold the same number of positions.

    Returns:
        For each group, in order, its dims in ``before`` and in ``after``; the last one is all that is left where sizes
        do not meet.
    """
    groups = []
    i = j = 0
    while i < len(before) or j < len(after):
        begin_i, begin_j = i, j
        left = right = 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right and i < len(before):
                left, i = left * before[i], i + 1
            elif right < left and j < len(after):
                right, j = right * after[j], j + 1
            else:
                return [(range(begin_i, len(before)), range(begin_j, len(after)))]
        groups.append((range(begin_i, i), range(begin_j, j)))
    return groups


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [dim for dim, size in enumerate(shape) if size != 1]


def emit_sizes(ctx: LocalCall) -> fx.Node:
    """Call the operator with the sizes that its result has on this rank."""
    return ctx.call(ctx.node.target, ctx.operand(0), ctx.out_sizes(0))


@BOOK.rule("view", "reshape", "_unsafe_view", "unflatten", "flatten", "_reshape_alias")
def view(rule: Rule) -> None:
    """A map for each group of neighbouring dims that is laid out anew; needed whole where their axes refuse that."""
    before, after = rule.shape(0), rule.out_shape()
    if rule.named("dtype") is not None:
        type_opaquely(rule, "bits read as another type")
        return
    rule.emit = lambda ctx: ctx.call(ctx.aten.reshape.default, ctx.operand(0), ctx.out_sizes(0))
    if math.prod(before) == 0:
        return
    if before == after:
        for dim in range(len(before)):
            rule.loop("map", [(0, dim)], [(0, dim)])
        return
    kept_before, kept_after = _without_ones(before), _without_ones(after)
    for ins, outs in aligned_segments([before[d] for d in kept_before], [after[d] for d in kept_after]):
        in_dims, out_dims = [kept_before[i] for i in ins], [kept_after[j] for j in outs]
        try:
            axes = rule.system.regroup([rule.actual[0][d] for d in in_dims], [after[d] for d in out_dims])
        except Conflict as conflict:
            for dim in in_dims:
                rule.opaque(0, dim, f"view {before} to {after}: {conflict}")
            continue
        for dim, axis in zip(out_dims, axes, strict=True):
            rule.result_axes[0][dim] = axis
        rule.add_regrouping(in_dims, out_dims)
    _keep_ones(rule, before, after)


def _keep_ones(rule: Rule, before: list[int], after: list[int]) -> None:
    """Dims of size 1 keep their axis where they keep their place from the left."""
    for dim, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            return
        if old == 1:
            rule.loop("map", [(0, dim)], [(0, dim)])


@BOOK.rule("permute", "transpose", "t", "movedim", "swapaxes", "numpy_T")
def permute(rule: Rule) -> None:
    """A map over every dim, which stands elsewhere in the result."""
    rank = len(rule.actual[0])
    order = _order(rule, rank)
    for dim, source in enumerate(order):
        rule.loop("map", [(0, source)], [(0, dim)])


def _order(rule: Rule, rank: int) -> list[int]:
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta")
    permuted = overload_of(rule.node)(probe, *rule.node.args[1:], **rule.node.kwargs)
    return [size - 2 for size in permuted.shape]


@BOOK.rule("unsqueeze")
def unsqueeze(rule: Rule) -> None:
    rank = len(rule.actual[0])
    new = rule.arg(1, "dim") % (rank + 1)
    for dim in range(rank):
        rule.loop("map", [(0, dim)], [(0, dim + (dim >= new))])


@BOOK.rule("squeeze")
def squeeze(rule: Rule) -> None:
    """A map over the dims that stay."""
    shape = rule.shape(0)
    which = rule.arg(1, "dim")
    asked = range(len(shape)) if which is None else [which] if isinstance(which, int) else which
    gone = {rule.wrapped(dim) for dim in asked if shape and shape[dim] == 1}
    kept = [dim for dim in range(len(shape)) if dim not in gone]
    for new, dim in enumerate(kept):
        rule.loop("map", [(0, dim)], [(0, new)])
    rule.emit = lambda ctx: ctx.call(ctx.aten.squeeze.dims, ctx.operand(0), sorted(gone))


@BOOK.rule("expand", "broadcast_to")
def expand(rule: Rule) -> None:
    """A map over every dim of the result; copies, too, over those that repeat a single position."""
    shape, out = rule.shape(0), rule.out_shape()
    lead = len(out) - len(shape)
    for dim, size in enumerate(out):
        operand_dim = dim - lead
        kept = operand_dim >= 0 and shape[operand_dim] == size
        rule.loop("map", [(0, operand_dim)] if kept else [], [(0, dim)])
        if operand_dim >= 0 and shape[operand_dim] == 1 < size:
            rule.add_copies(operand_dim, dim)
    rule.emit = lambda ctx: ctx.call(ctx.aten.expand.default, ctx.operand(0), ctx.out_sizes(0))


@BOOK.rule("expand_as")
def expand_as(rule: Rule) -> None:
    from .pointwise import broadcast

    broadcast(rule)


@BOOK.rule("repeat")
def repeat(rule: Rule) -> None:
    """A map over every dim, of which a repeated one becomes a factor; copies over those of a single position."""
    shape, counts = rule.shape(0), list(rule.arg(1, "repeats"))
    lead = len(counts) - len(shape)
    for dim, count in enumerate(counts):
        operand_dim = dim - lead
        if operand_dim >= 0 and shape[operand_dim] == 1 < count:
            rule.add_copies(operand_dim, dim)
        if operand_dim < 0 or shape[operand_dim] == 1:
            continue
        axis = rule.actual[0][operand_dim]
        rule.loop("map", [(0, operand_dim)], [(0, dim)])
        if count != 1:
            rule.result_axes[0][dim] = _tiled(rule, count, axis)


def _tiled(rule: Rule, count: int, axis: Any) -> Any:
    """``count`` copies end to end; a concatenation repeated has no other form than its parts repeated."""
    if isinstance(resolve(axis), Concat):
        return Concat([axis] * count)
    return Product((rule.system.atom(count), axis))


@BOOK.rule("repeat_interleave")
def repeat_interleave(rule: Rule) -> None:
    """A map over every dim; the repeated one becomes an outer factor."""
    count, which = rule.arg(1, "repeats"), rule.arg(2, "dim")
    if not isinstance(count, int) or which is None:
        type_opaquely(rule, "repeats are data")
        return
    which = rule.wrapped(which)
    for dim, axis in enumerate(rule.actual[0]):
        rule.loop("map", [(0, dim)], [(0, dim)])
        if dim == which:
            rule.result_axes[0][dim] = Product((axis, rule.system.atom(count)))
    rule.emit = lambda ctx: ctx.same(output_size=None)


@BOOK.rule("meshgrid")
def meshgrid(rule: Rule) -> None:
    """A map over the one dim of every operand, which is a dim of every result."""
    count = len(rule.operands)
    swapped = count > 1 and rule.named("indexing", "ij") == "xy"
    for operand in range(count):
        dim = 1 - operand if swapped and operand < 2 else operand
        if rule.actual[operand]:
            rule.loop("map", [(operand, 0)], [(result, dim) for result in range(count)])


@BOOK.rule("as_strided", "as_strided_copy")
def as_strided(rule: Rule) -> None:
    """Positions of memory: those of the operand as it was captured, which on a rank may lie otherwise."""
    for dim in range(len(rule.actual[0])):
        rule.opaque(0, dim, "positions of memory")
    places = _in_memory(rule)

    def emit(ctx: LocalCall) -> fx.Node:
        if places is None:
            raise PartitionError("takes memory that is not its operand's: write it with slices")
        flat = ctx.call(ctx.aten.reshape.default, ctx.operand(0), [-1])
        taken = ctx.call(ctx.aten.index_select.default, flat, 0, ctx.constant(places))
        return ctx.call(ctx.aten.reshape.default, taken, ctx.out_sizes(0))

    rule.emit = emit


def _in_memory(rule: Rule) -> torch.Tensor | None:
    """Which position of the operand each one of the result is, both counted row by row; None where it takes others."""
    operand = rule.operands[0].meta["val"]
    size, stride, offset = rule.named("size"), rule.named("stride"), rule.named("storage_offset")
    start = 0 if offset is None else offset - operand.storage_offset()
    length = 1 + sum((extent - 1) * step for extent, step in zip(operand.shape, operand.stride(), strict=True))
    memory = torch.full([max(length, 1)], -1)
    memory.as_strided(operand.shape, operand.stride()).copy_(torch.arange(operand.numel()).view(operand.shape))
    last = start + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    places = memory.as_strided(size, stride, start).flatten() if start >= 0 and last < length else memory[:0]
    return places if math.prod(size) == len(places) and (places >= 0).all() else None


@BOOK.rule("outer", "ger")
def outer(rule: Rule) -> None:
    rule.loop("map", [(0, 0)], [(0, 0)])
    rule.loop("map", [(1, 0)], [(0, 1)])
