"""Finds the batch: the axis along which a call is several independent ones."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.axes import Axis, Concat, atoms, outermost, same
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.local.layout import Chosen, Layout
from xdit_compile.passes.partition.program import partition
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import BATCH, DATA, MEMBERS

from .tokens import Units, weigh


def choose_batch(inference: Inference, data: int, cfg: int) -> Chosen:
    """What gives every rank whole entries of the batch: over all these ranks, or over the ``data`` ranks alone.

    The batch is the outermost axis that an input and a result have in common. Guidance branches that a pipeline stacks
    are halves of it, and so are several images: nothing needs to know which.

    Args:
        data, cfg: how many ranks there are of each.

    Returns:
        The batch for `BATCH`, which stands for all of them, or for `DATA`; for neither where it has too few entries.
    """
    over_all = _units(inference, data * cfg)
    return {BATCH: over_all, DATA: () if over_all else _units(inference, data)}


def _units(inference: Inference, parts: int) -> Units:
    """The batch, if it has an entry for each of several parts."""
    axis = batch_axis(inference)
    return () if parts == 1 or axis is None or axis.size < parts else ((axis,),)


def batch_axis(inference: Inference) -> Axis | None:
    """The one atom that is outermost in the first dim of a result and of an input; None where there is no such atom."""
    axis = _shared(inference)
    return axis if axis is not None and len(atoms(axis)) == 1 else None


def choose_joined_batch(inference: Inference, plan: Plan) -> Chosen:
    """The same where the graph takes the batch apart, so that what it does between is gathered.

    Entries that are cut out and joined again make a concatenation. Each of its parts is shared if it has entries
    enough, or all of them as one; nothing is split where the gathers cost more than that saves.
    """
    axis = _shared(inference)
    if isinstance(axis, Concat) and plan.fallback != "error":
        for name in (BATCH, DATA):
            parts = Mesh.simulated(plan, 0).size(MEMBERS[name])
            units = _cheapest(inference, plan, name, list(_ways(axis, parts))) if axis.size >= parts > 1 else ()
            if units:
                return {BATCH: (), DATA: (), name: units}
    return {BATCH: (), DATA: ()}


def _ways(axis: Concat, parts: int) -> Iterator[Units]:
    """Every part shared by itself, or all entries as one."""
    if min(part.size for part in axis.parts) >= parts and all(len(atoms(part)) == 1 for part in axis.parts):
        yield tuple((part,) for part in axis.parts)
    yield ((axis,),)


def _cheapest(inference: Inference, plan: Plan, name: str, tried: list[Units]) -> Units:
    """The units whose split costs least; none where no split does."""
    mesh, every = Mesh.simulated(plan, 0), [(), *tried]
    costs = [weigh(partition(inference, Layout.of(plan, mesh, {name: units})).ledger) for units in every]
    return every[costs.index(min(costs))]


def _shared(inference: Inference) -> Axis | None:
    """What is outermost in the first dim of a result and of an input; the first result that has it counts."""
    users = {spec.name for spec in inference.program.inputs if spec.kind == "user"}
    root = inference.program.root.graph
    entering = [
        outermost(inference.axes[node][0][0])
        for node in root.find_nodes(op="placeholder")
        if node.name in users and inference.axes[node][0]
    ]
    (output,) = root.find_nodes(op="output")
    for leaf in output.args[0]:
        axes = inference.axes[leaf][0] if isinstance(leaf, fx.Node) else ()
        if axes and any(same(outermost(axes[0]), axis) for axis in entering):
            return outermost(axes[0])
    return None
