"""Finds what PipeFusion cuts into patches: the tokens of the picture, so that input and result are cut alike.

Tokens that attend together with the picture's but are none of them, such as a prompt's, travel with the first patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import PartitionError, PlanError
from xdit_compile.ir.axes import Axis, Product, atoms
from xdit_compile.ir.sharding import Split, Unit
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.choose.tokens import Units, token_axes, ways
from xdit_compile.passes.local.layout import Layout
from xdit_compile.passes.partition.program import Partitioned, partition
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import PATCH

from .assign_stages import everywhere, too_many_stages

MOST_FAMILIES = 4


def choose_patches(inference: Inference, plan: Plan) -> Split:
    """The cut of the tokens into ``plan.patch_count`` parts in which patches meet in attention alone.

    Raises:
        PlanError: where no cut does, with the reason of the first that was tried; or there are too few blocks.
    """
    reasons: list[str] = []
    for split in cuts(inference, plan):
        reason = _refused(inference, plan, split)
        if reason is None:
            return split
        reasons.append(reason)
    if not reasons:
        reasons = [f"no attention has {plan.patch_count} rows of tokens that stand in the input and in the result"]
    check_stages(inference, plan)
    raise PlanError(cannot_cut(plan, reasons[0]))


def cannot_cut(plan: Plan, reason: str) -> str:
    """What to say where no patches can be made."""
    return (
        f"pipefusion={plan.pipefusion} cannot cut this denoiser into {plan.patch_count} patches: {reason}; "
        "give another number of them as patches=N, or take another method"
    )


def check_stages(inference: Inference, plan: Plan) -> None:
    """See that there are blocks enough for the stages of a plan, where any repeat.

    Raises:
        PlanError: there are fewer.
    """
    blocks = sum(bool(call.meta.get("repeated")) for call in inference.program.calls())
    if plan.pipefusion > blocks > 0:
        raise PlanError(too_many_stages(plan.pipefusion, blocks))


def cuts(inference: Inference, plan: Plan) -> Iterator[Split]:
    """Cuts of the result's tokens, those of the costliest attention first."""
    finals = [axis for axes in _finals(inference) for axis in axes]
    for axis in token_axes(inference)[:MOST_FAMILIES]:
        for units in ways(axis, plan.patch_count):
            split = _split(units, plan.patch_count, finals)
            if split is not None:
                yield split
                yield from _with_copies(inference, split)


def _finals(inference: Inference) -> Iterator[list[Axis]]:
    (output,) = inference.program.root.graph.find_nodes(op="output")
    for leaf in output.args[0]:
        if isinstance(leaf, fx.Node):
            yield inference.axes[leaf][0]


def _split(units: Units, patches: int, finals: Iterable[Axis]) -> Split | None:
    """The cut of these units; None where the result has none of them, or fewer positions than patches, or is cut in
    two ways at once."""
    plain = Split(PATCH, patches, units)
    final = [unit for unit in units if any(Split(PATCH, patches, [unit]).splits(axis) for axis in finals)]
    if not final or not any(map(plain.splits, finals)):
        return None
    if any(plain.length(_whole(unit), patches - 1) == 0 for unit in final):
        return None
    others = [unit for unit in units if unit not in final]
    return Split(PATCH, patches, units, {unit[0]: (unit[0].size,) * patches for unit in others if len(unit) == 1})


def _with_copies(inference: Inference, split: Split) -> Iterator[Split]:
    """The cut in which copies of one position of the picture, such as its last to fill up a block, go where it goes;
    none where there are no such copies."""
    own = Split(PATCH, split.parts, [unit for unit in split.units if unit[0] not in split.cuts])
    held = _held_alone(inference, own)
    units = dict.fromkeys([*split.units, *((axis,) for axis in held)])
    ends = {axis: tuple(axis.size * (at >= patch) for at in range(split.parts)) for axis, patch in held.items()}
    if held:
        yield Split(PATCH, split.parts, units, {**split.cuts, **ends})


def _held_alone(inference: Inference, split: Split) -> dict[Axis, int]:
    """The axes of positions of the picture that are picked out and of their copies, with the patch that has them."""
    held: dict[Axis, int] = {}
    for _, _, op_axes in inference.nodes():
        for loop in op_axes.loops:
            if loop.kind not in ("halo", "copies"):
                continue
            ((_, dim),), ((_, to),) = loop.args, loop.outs
            read, made = op_axes.operand_axes[0][dim], op_axes.result_axes[0][to]
            if loop.kind == "copies" and read in held:
                held[made] = held[read]
            elif loop.kind == "halo" and split.splits(read) and made.size == 1:
                row, _ = op_axes.windows[dim].rows(0, 1)
                held[made] = next(at for at in range(split.parts) if row in split.positions(read, at))
    return held


def _whole(unit: Unit) -> Axis:
    return unit[0] if len(unit) == 1 else Product(unit)


def _refused(inference: Inference, plan: Plan, split: Split) -> str | None:
    """Why patches of this cut meet elsewhere than in attention."""
    if not varying(inference, split):
        return "no input is cut as the result is"
    layout = Layout.of(plan, Mesh.simulated(plan, 0), {})
    for patch in {0, plan.patch_count - 1}:
        try:
            one_patch(inference, layout, split, patch)
        except PartitionError as error:
            return str(error)
    return None


def one_patch(inference: Inference, layout: Layout, split: Split, patch: int) -> Partitioned:
    """The program of one patch: of what every patch needs alike it is given the results."""
    names = varying(inference, split)
    own = layout.keeping(split, patch)
    return partition(inference, own, varying=names, shared=everywhere(inference, names))


def varying(inference: Inference, split: Split) -> list[str]:
    """Names of the inputs that change from step to step as the result does: cut alike, and alike but for one dim.

    What is left out, such as positions and time steps of single tokens, every stage takes from its own arguments. Where
    no input is so, as the results are tokens of a picture that came as one, all are that have the result's positions.
    """
    finals = [axes for axes in _finals(inference) if any(split.splits(axis) for axis in axes)]
    placeholders = {
        node.name: inference.axes[node][0] for node in inference.program.root.graph.find_nodes(op="placeholder")
    }
    users = [each.name for each in inference.program.inputs if each.kind == "user"]
    found = [name for name in users if any(_alike(placeholders[name], final, split) for final in finals)]
    if found:
        return found
    return [name for name in stepping(inference, split.units)[0] if any(map(split.splits, placeholders[name]))]


def stepping(inference: Inference, units: Iterable[Unit]) -> tuple[list[str], list[str]]:
    """Names of the inputs that have positions of the result's own tokens, which may change from step to step; then of
    those among them that are shaped as the result but for one dim, which do."""
    finals = list(_finals(inference))
    made = {id(atom) for axes in finals for axis in axes for atom in atoms(axis)}
    cut = {id(atom) for unit in units for axis in unit for atom in atoms(axis)} & made
    users = {given.name for given in inference.program.inputs if given.kind == "user"}
    names, alike = [], []
    for node in inference.program.root.graph.find_nodes(op="placeholder"):
        axes = inference.axes[node][0]
        if node.name in users and any(id(atom) in cut for axis in axes for atom in atoms(axis)):
            names.append(node.name)
            if any(len(axes) == len(final) and len(_resized(axes, final)) <= 1 for final in finals):
                alike.append(node.name)
    return names, alike


def _alike(axes: list[Axis], final: list[Axis], split: Split) -> bool:
    lie = [[split.places(axis) for axis in each] for each in (axes, final)]
    return len(axes) == len(final) and len(_resized(axes, final)) <= 1 and lie[0] == lie[1]


def _resized(axes: list[Axis], final: list[Axis]) -> list[int]:
    return [dim for dim, (one, two) in enumerate(zip(axes, final, strict=False)) if one.size != two.size]
