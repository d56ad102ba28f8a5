"""Fetching the rows that a rank's windows reach over, and making rows of a result out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import fx

from xdit_compile.ir.sharding import Split
from xdit_compile.kernels.collectives.row_exchange import RowExchange
from xdit_compile.passes.axes.local_call import LocalCall
from xdit_compile.passes.axes.operators import ConvolutionOp
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.axes.windows import HaloWindow
from xdit_compile.plan.methods import PATCH

from .choose_loop import ShardedLoop, feasible, required
from .context import LoweringContext
from .halo_request import Request
from .ledger import STALE
from .local_graph import aten
from .stale_exchange import Exchange


def fetch(
    context: LoweringContext, op_axes: OpAxes, inputs: fx.Node, choices: Mapping[str, ShardedLoop]
) -> tuple[fx.Node, dict[int, HaloWindow]]:
    """Bring the rows that this rank's windows reach over, and keep what patches will want of one another.

    Args:
        inputs: this rank's shard of the first operand.
        choices: the loop that each mesh dimension splits; those of kind ``halo`` need rows.

    Returns:
        The first operand with just the rows that are read, and which these are, by the dim that is split.
    """
    seen = {}
    keep_rows(context, op_axes, inputs, choices)
    for name, choice in choices.items():
        if choice.loop.kind == "halo":
            inputs, seen[choice.operands[0]] = _fetch(context, op_axes, inputs, name, choices)
    return inputs, seen


def _fetch(
    context: LoweringContext, op_axes: OpAxes, inputs: fx.Node, name: str, choices: Mapping[str, ShardedLoop]
) -> tuple[fx.Node, HaloWindow]:
    if name == PATCH and not context.layout.apart:
        return _left(context, op_axes, inputs, choices)
    request = ask(context, op_axes, name, choices)
    if name == PATCH:
        return _kept(context, op_axes, inputs, choices, request), request.seen
    if request.needed:
        inputs = context.local.call(torch.ops.xdit_compile.halo_exchange.default, inputs, *request.rows.arguments)
    return inputs, request.seen


def _left(
    context: LoweringContext, op_axes: OpAxes, inputs: fx.Node, choices: Mapping[str, ShardedLoop]
) -> tuple[fx.Node, HaloWindow]:
    """This patch's rows and those that other patches left there, as far as its windows reach."""
    request = _wanted(context.sharding.splits[PATCH], context.sharding.index[PATCH], op_axes, choices[PATCH])
    if request.needed:
        state = _state(context, op_axes, choices)
        context.local.put(state, inputs, request.rows.dim, np.arange(*request.rows.own))
        inputs = _read(context, op_axes, state, request.rows.dim, (request.seen.start, request.seen.stop))
    return inputs, request.seen


def _kept(
    context: LoweringContext, op_axes: OpAxes, inputs: fx.Node, choices: Mapping[str, ShardedLoop], request: Request
) -> fx.Node:
    """This rank's rows and those of others that its windows reach over, as they are or as the last call left them."""
    if not request.needed:
        return inputs
    (start, stop), seen = request.rows.own, request.seen
    first = min(start, seen.start) if seen.stop > seen.start else start
    last = max(stop, seen.stop) if seen.stop > seen.start else stop
    state = _state(
        context, op_axes, choices, last - first, Exchange.of_rows(request, first, context.layout.mesh.behind)
    )
    context.local.put(state, inputs, request.rows.dim, np.arange(start - first, stop - first))
    if context.layout.stale:
        return _read(context, op_axes, state, request.rows.dim, (seen.start - first, seen.stop - first))
    rows = context.local.call(torch.ops.xdit_compile.halo_exchange.default, inputs, *request.rows.arguments)
    context.local.put(state, rows, request.rows.dim, np.arange(seen.start - first, seen.stop - first))
    return rows


def _read(context: LoweringContext, op_axes: OpAxes, state: fx.Node, dim: int, rows: tuple[int, int]) -> fx.Node:
    """Rows of a state for an operator; copied where its result may be a view of them, as they change later."""
    seen = context.local.call(aten.slice.Tensor, state, dim, *rows)
    makes_anew = isinstance(op_axes.operator, ConvolutionOp)
    return seen if makes_anew else context.local.call(aten.clone.default, seen)


def keep_rows(context: LoweringContext, op_axes: OpAxes, inputs: fx.Node, choices: Mapping[str, ShardedLoop]) -> None:
    """Where all patches are computed at once, keep what the windows of each will want of the others'.

    ``inputs`` are the rows of all patches; they are written to a state.
    """
    patches = context.layout.patches
    if patches is None or PATCH in context.sharding.splits:
        return
    for loop in op_axes.loops:
        choice = feasible(op_axes, loop, patches) if loop.kind == "halo" else None
        if choice is not None and (request := _wanted(patches, 0, op_axes, choice)).needed:
            context.local.put(
                _state(context, op_axes, choices), inputs, request.rows.dim, np.arange(sum(request.rows.sizes))
            )


def _state(
    context: LoweringContext,
    op_axes: OpAxes,
    choices: Mapping[str, ShardedLoop],
    rows: int | None = None,
    exchange: Exchange | None = None,
) -> fx.Node:
    """Room for the rows of all patches, or for so many of them that come from other ranks."""
    others = {name: choice for name, choice in choices.items() if name != PATCH}
    shape = context.sharding.sizes(op_axes.operand_axes[0], required(others, 0))
    operand, name = op_axes.operands[0], ""
    if exchange is not None and rows is not None:
        wanted = exchange.rows
        shape[wanted.dim], name = rows, "_" + "_".join(map(str, (*wanted.starts, *wanted.stops)))
    return context.local.state(f"{operand.name}_rows{name}", shape, operand.meta["val"].dtype, exchange)


def ask(
    context: LoweringContext, op_axes: OpAxes, name: str, choices: Mapping[str, ShardedLoop], hidden: bool = False
) -> Request:  # fmt: skip
    """Which rows every rank of mesh dimension ``name`` wants of the first operand, counted in the ledger.

    Args:
        choices: the loop that each mesh dimension splits; that of ``name`` is of kind ``halo``.
        hidden: whether anything is computed before they are there.
    """
    request = _wanted(context.sharding.splits[name], context.sharding.index[name], op_axes, choices[name])
    if request.needed:
        shard = context.sharding.sizes(op_axes.operand_axes[0], required(choices, 0))
        numel = request.rows.elements_sent(shard)
        op = STALE if name == PATCH and context.layout.stale else "halo_exchange"
        context.ledger.sent(op, "halo", numel, op_axes.operands[0].meta["val"].dtype, hidden)
    return dataclasses.replace(request, rows=dataclasses.replace(request.rows, group=context.local.group(name)))


def _wanted(split: Split, here: int, op_axes: OpAxes, choice: ShardedLoop) -> Request:
    dim, out = choice.operands[0], choice.results[0]
    windows = op_axes.windows[dim]
    made, read = split.ends(op_axes.result_axes[0][out]), split.ends(op_axes.operand_axes[0][dim])
    assert made is not None and read is not None
    wanted = [windows.rows(start, stop) for start, stop in zip((0, *made), made, strict=False)]
    owned = list(zip((0, *read), read, strict=False))
    starts, stops = ([rows[k] for rows in wanted] for k in range(2))
    sizes = [stop - start for start, stop in owned]
    seen = HaloWindow(windows, *wanted[here], (0, *made)[here], made[here])
    needed = any(rows != own for rows, own in zip(wanted, owned, strict=True))
    return Request(RowExchange.of(dim, starts, stops, sizes, here), seen, needed)


def moved(ctx: LocalCall, fill: float = 0.0) -> fx.Node:
    """The first operand with every seen row put where its windows of one row say; ``fill`` stands for padding.

    In each dim of ``ctx.seen`` it has this rank's rows of the result then, in others what it had.
    """
    node = ctx.operand(0)
    for dim, seen in ctx.seen.items():
        sources = seen.windows.first[seen.first : seen.last]
        inside = (sources >= 0) & (sources < seen.windows.size)
        node = ctx.take(node, dim, sources[inside] - seen.start, seen.stop - seen.start)
        amounts = [int(np.argmax(inside)), int(np.argmax(inside[::-1]))] if inside.any() else [len(sources), 0]
        if any(amounts):
            behind = [0, 0] * (len(ctx.operand_sizes(0)) - 1 - dim)
            node = ctx.call(aten.constant_pad_nd.default, node, [*behind, *amounts], fill)
    return node
