"""Finds the rows: what an autoencoder is split by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.axes import Axis, Product
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.local.layout import Chosen, Layout
from xdit_compile.passes.partition.program import partition
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import SEQUENCE

from .batch import choose_batch
from .tokens import Units, weigh


def choose_rows(inference: Inference, plan: Plan) -> Chosen:
    """The batch for the plan's data ranks, and the spatial dim whose split over its sequence ranks costs least.

    Rows come first, then columns, then what stands before them (frames): the first whose parts meet nothing that needs
    all of them is taken. None where the input has no dim that convolutions or other windows slide over.
    """
    batch = choose_batch(inference, plan.data, 1)
    return {**batch, SEQUENCE: _rows(inference, plan) if plan.sequence > 1 else ()}


def _rows(inference: Inference, plan: Plan) -> Units:
    plan = dataclasses.replace(plan, data=1)
    chosen: Units = ()
    lowest = float("inf")
    for unit in (_unit(axis) for axis in spatial_axes(inference)):
        layout = Layout.of(plan, Mesh.simulated(plan, 0), {SEQUENCE: (unit,)})
        ledger = partition(inference, layout).ledger
        if all(gather.reason == "the result" for gather in ledger.gathers):
            return (unit,)
        if weigh(ledger) < lowest:
            lowest, chosen = weigh(ledger), (unit,)
    return chosen


def spatial_axes(inference: Inference) -> list[Axis]:
    """Axes of the largest input that windows slide over: the last but one first, then the last, then the others."""
    users = {spec.name for spec in inference.program.inputs if spec.kind == "user"}
    nodes = [node for node in inference.program.root.graph.find_nodes(op="placeholder") if node.name in users]
    if not nodes:
        return []
    axes = inference.axes[max(nodes, key=lambda node: node.meta["val"].numel())][0]
    seen = {id(inner) for axis in _looked_at(inference) for inner in (axis, _unit(axis)[0])}
    dims = [dim for dim, axis in enumerate(axes) if id(_unit(axis)[0]) in seen and axis.size > 1]
    last = len(axes) - 1
    return [axes[dim] for dim in sorted(dims, key=lambda dim: (dim != last - 1, dim != last, -dim))]


def _looked_at(inference: Inference) -> Iterator[Axis]:
    for _, _, op_axes in inference.nodes():
        for loop in op_axes.loops:
            if loop.kind == "halo":
                operand, dim = loop.args[0]
                yield op_axes.operand_axes[operand][dim]


def _unit(axis: Axis) -> tuple[Axis, ...]:
    """What is cut of an axis: of a product its outermost factor."""
    return (axis.factors[0] if isinstance(axis, Product) else axis,)
