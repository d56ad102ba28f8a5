"""Teaches inductor to keep ops that reach other ranks in the order of the graph, on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile.kernels import collectives, draws, ring  # noqa: F401 - they register the ops
from xdit_compile.kernels.collectives.registration import ordered_ops

BEGUN = torch.ops.xdit_compile.all_to_all_start.default
ROWS_BEGUN = torch.ops.xdit_compile.halo_start.default
FINISHED, SETTLED = torch.ops.xdit_compile.all_to_all_finish.default, torch.ops.xdit_compile.all_to_all_settle.default


def pin_order() -> None:
    """Give each op of `ordered_ops` a lowering that waits for the one before it; to be called before compiling.

    The effect that they are registered with keeps these ops alive, and in order up to inductor's scheduler. There
    torch 2.13 files the dependency under the name of a buffer and looks for it under that of an operation, so that the
    pass which lowers peak memory moves one collective before another, otherwise on ranks of other sizes: a deadlock.
    Calling this again does nothing. It is no part of importing an op, since it imports inductor.
    """
    from torch._inductor import lowering

    for op in ordered_ops():
        if op not in lowering.lowerings:
            lowered = _in_place if op is FINISHED else _lowering(op)
            lowering.register_lowering(op, type_promotion_kind=None)(lowered)


def options_for(graph: fx.Graph, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options for one graph: where exchanges are begun ahead of what is computed meanwhile, the order of the
    graph is kept, which the pass that lowers peak memory would give up.

    A convolution that is computed while rows of other ranks are on their way is read behind these alone, where another
    pass would move it, to be near what reads it.
    """
    calls = {node.target for node in graph.nodes}
    kept = [("reorder_for_peak_memory", {BEGUN, ROWS_BEGUN}), ("reorder_for_locality", {ROWS_BEGUN})]
    return {**options, **{name: False for name, ops in kept if ops & calls}}


def _in_place(arriving: Any, sent: Any, group: str) -> Any:
    """What an all-to-all brought, in the memory where it came: written by the wait, and so read after it alone."""
    _lowering(SETTLED)(arriving, sent, group)
    return arriving


def _lowering(op: torch._ops.OpOverload) -> Any:
    from torch._inductor import ir

    def boxed(value: Any) -> Any:
        return ir.TensorBox.create(value) if isinstance(value, ir.IRNode) else value

    def lower(*args: Any, **kwargs: Any) -> Any:
        rest = op._schema.arguments[len(args) :]
        given = {argument.name: kwargs.get(argument.name, argument.default_value) for argument in rest}
        named = {argument.name: given.pop(argument.name) for argument in rest if argument.kwarg_only}
        return pytree.tree_map(boxed, ir.EffectfulKernel.create(op, *args, *given.values(), **named))

    return lower
