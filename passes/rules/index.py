"""Rules of operators that look positions up in tables, and of those that make tensors from nothing."""

from __future__ import annotations

import torch
from torch import fx

from xdit_compile.passes.axes.local_call import LocalCall
from xdit_compile.passes.axes.rule import Rule, RuleBook, type_opaquely

from .cat_split_slice import cut_out

BOOK = RuleBook()


@BOOK.rule("embedding")
def embedding(rule: Rule) -> None:
    """A map over every dim of the indices and over channels; the rows of the table are needed whole."""
    rank = len(rule.actual[1])
    for dim in range(rank):
        rule.loop("map", [(1, dim)], [(0, dim)])
    rule.loop("whole", [(0, 0)], [])
    rule.loop("map", [(0, 1)], [(0, rank)])


@BOOK.rule("index_select")
def index_select(rule: Rule) -> None:
    """A map over every dim, of which the looked-up one is the indices'; positions of that are needed whole.

    Neighbouring positions that are known beforehand are a slice.
    """
    chosen = rule.wrapped(rule.arg(1, "dim"))
    if rule.actual[0] and _is_slice(rule, chosen):
        return
    for dim in range(len(rule.actual[0])):
        if dim == chosen:
            rule.loop("whole", [(0, dim)], [])
            rule.loop("map", [(1, 0)], [(0, dim)])
        else:
            rule.loop("map", [(0, dim)], [(0, dim)])


@BOOK.rule("index")
def index(rule: Rule) -> None:
    """A map over dims that are not looked up, and over those of the indices, in the place of looked-up ones.

    Positions of looked-up dims are needed whole; neighbouring ones that are known beforehand are a slice.
    """
    indices = list(rule.arg(1, "indices"))
    used = [dim for dim, value in enumerate(indices) if isinstance(value, fx.Node)]
    one_run = used == list(range(used[0], used[-1] + 1))
    if not one_run or any(
        str(value.meta["val"].dtype) in ("torch.bool", "torch.uint8") for value in indices if value is not None
    ):
        type_opaquely(rule, "indices apart from one another or boolean")
        return
    if len(used) == 1 and _is_slice(rule, used[0]):
        return
    rank = len(rule.actual[0])
    spread = max(len(axes) for axes in rule.actual[1:])
    for dim in range(rank):
        if dim in used:
            rule.loop("whole", [(0, dim)], [])
        else:
            rule.loop("map", [(0, dim)], [(0, dim if dim < used[0] else dim - len(used) + spread)])
    for dim in range(spread):
        out = used[0] + dim
        pairs = []
        for operand in range(1, len(rule.actual)):
            operand_dim = dim - (spread - len(rule.actual[operand]))
            if operand_dim >= 0 and rule.shape(operand)[operand_dim] == rule.out_shape()[out]:
                pairs.append((operand, operand_dim))
        rule.loop("map", pairs, [(0, out)])


def _is_slice(rule: Rule, dim: int) -> bool:
    """Looking up neighbouring positions in order, known beforehand, is a slice."""
    positions = rule.constant(1)
    if positions is None or positions.dim() != 1 or len(positions) == 0:
        return False
    size, length = rule.shape(0)[dim], len(positions)
    rows = [position % size for position in positions.tolist()]
    start = rows[0]
    if rows != list(range(start, start + length)):
        return False
    rule.cut = (dim, start, length)
    for other in range(len(rule.actual[0])):
        if other != dim:
            rule.loop("map", [(0, other)], [(0, other)])
    cut_out(rule, dim, start, length)
    if rule.emit is None:
        rule.emit = lambda ctx: ctx.call(ctx.aten.slice.Tensor, ctx.operand(0), dim, start, start + length)
    return True


@BOOK.rule("gather")
def gather(rule: Rule) -> None:
    """A map over every dim; that along which is looked up is the indices', the operand's is needed whole."""
    chosen = rule.wrapped(rule.arg(1, "dim"))
    for dim in range(len(rule.actual[0])):
        if dim == chosen:
            rule.loop("whole", [(0, dim)], [])
            rule.loop("map", [(1, dim)], [(0, dim)])
        elif rule.shape(0)[dim] == rule.shape(1)[dim]:
            rule.loop("map", [(0, dim), (1, dim)], [(0, dim)])
        else:
            rule.opaque(0, dim, "gathered from part of a dim")
            rule.opaque(1, dim, "gathered from part of a dim")


@BOOK.rule("index_put")
def index_put(rule: Rule) -> None:
    """What a mask chooses takes the same value everywhere: a choice between two tensors."""
    indices, rest = rule.arg(1, "indices"), len(rule.actual[0]) - len(rule.actual[1])
    mask = indices[0].meta["val"] if len(indices) == 1 and isinstance(indices[0], fx.Node) else None
    if mask is None or mask.dtype != torch.bool or rule.arg(3, "accumulate", False) or len(rule.actual[2]) > rest:
        type_opaquely(rule, "positions that are data")
        return
    for dim in range(len(rule.actual[0])):
        back = dim - len(rule.actual[0]) + len(rule.actual[2])
        chosen = [(1, dim)] if dim < len(rule.actual[1]) else []
        valued = [(2, back)] if back >= 0 and rule.shape(2)[back] == rule.shape(0)[dim] else []
        rule.loop("map", [(0, dim), *chosen, *valued], [(0, dim)])

    def emit(ctx: LocalCall) -> fx.Node:
        where = ctx.operand(1)
        for _ in range(rest):
            where = ctx.call(ctx.aten.unsqueeze.default, where, -1)
        return ctx.call(ctx.aten.where.self, where, ctx.operand(2), ctx.operand(0))

    rule.emit = emit


@BOOK.rule("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def constant(rule: Rule) -> None:
    """Equal everywhere: any rank can make just its own positions. A tensor given as a model is not looked at."""
    _anything(rule)
    models = 1 if "new_" in str(rule.node.target) else 0

    def emit(ctx: LocalCall) -> fx.Node:
        model = [ctx.operand(0)] if models else []
        return ctx.call(ctx.node.target, *model, ctx.out_sizes(0), *ctx.node.args[models + 1 :], **ctx.node.kwargs)

    rule.emit = emit


@BOOK.rule("zeros_like", "ones_like", "full_like", "empty_like")
def constant_like(rule: Rule) -> None:
    """The same for operators that take their shape from a tensor."""
    _anything(rule)
    kind = rule.name.removesuffix("_like")
    options = {name: value for name, value in rule.node.kwargs.items() if name != "memory_format"}
    rule.emit = lambda ctx: ctx.call(
        getattr(ctx.aten, f"new_{kind}").default, ctx.operand(0), ctx.out_sizes(0), *ctx.node.args[1:], **options
    )


def _anything(rule: Rule) -> None:
    for dim in range(len(rule.out_shape())):
        rule.loop("map", [], [(0, dim)])
    for operand in range(len(rule.operands)):
        rule.ignore(operand)
    if rule.name.endswith("_like"):
        rule.result_axes[0] = list(rule.actual[0])


@BOOK.rule("arange", "linspace", "scalar_tensor", "rand", "randn", "randint", "randperm", "eye", "logspace")
def table(rule: Rule) -> None:
    """Made whole on every rank and sliced where it meets a split tensor."""


@BOOK.rule("rand_like", "randn_like", "randint_like", "bernoulli", "multinomial", "normal", "rrelu_with_noise")
def draw(rule: Rule) -> None:
    """Random numbers are drawn whole: a rank that drew only its own would draw others."""
    for operand, axes in enumerate(rule.actual):
        for dim in range(len(axes)):
            rule.loop("whole", [(operand, dim)], [])


@BOOK.rule("tril", "triu")
def triangle(rule: Rule) -> None:
    """A map over leading dims; rows and columns are needed whole, as each counts from the first."""
    rank = len(rule.actual[0])
    for dim in range(rank - 2):
        rule.loop("map", [(0, dim)], [(0, dim)])
    for dim in (rank - 2, rank - 1):
        rule.loop("whole", [(0, dim)], [(0, dim)])
