"""Finds heads, feed-forward channels and channels between convolutions: what tensor parallelism splits."""

from __future__ import annotations

import math
from collections.abc import Iterable

from xdit_compile.errors import PlanError
from xdit_compile.ir.axes import Axis, Concat, atoms, outermost, parts_of
from xdit_compile.ir.sharding import Split, Unit
from xdit_compile.passes.axes.axis_roles import roles, sums_channels
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.axes.operators import LinearOp
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.lowering.small_linear import has_few_rows
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import TENSOR

from .tokens import Units


def choose_features(inference: Inference, plan: Plan) -> Units:
    """The units of heads and feed-forward channels that ``plan.split_scheme`` names; none with one tensor rank.

    Channels of linears with few rows are left out: those are computed by columns, each by itself.

    Raises:
        PlanError: with more tensor ranks than any of these has positions.
    """
    if plan.tensor == 1:
        return ()
    inner = ("ffn", "channels")
    wanted = {"heads": ("heads",), "ffn": inner, "all": ("heads", *inner)}[plan.split_scheme]
    units: dict[int, Unit] = {}
    for use in roles(inference):
        if use.role in wanted and not (use.role == "ffn" and has_few_rows(use.node)):
            for axis in parts_of(use.axis):
                unit = outermost(axis)
                if unit.size > 1:
                    units.setdefault(id(unit), (unit,))
    _check_degree(plan, [_size(unit) for unit in units.values()])
    typed = (op_axes for _, _, op_axes in inference.nodes())
    linears = [op_axes for op_axes in typed if isinstance(op_axes.operator, LinearOp) or sums_channels(op_axes)]
    return tuple(_summable(linears, _unchained(linears, _disjoint(units.values())), plan.tensor))


def _check_degree(plan: Plan, sizes: list[int]) -> None:
    most = max(sizes, default=1)
    if plan.tensor > most:
        what = {"all": "heads or feed-forward channels", "heads": "heads", "ffn": "feed-forward channels"}
        raise PlanError(
            f"tensor={plan.tensor} is more than this model's {what[plan.split_scheme]} allow; choose at most {most}"
            if most > 1
            else f"tensor={plan.tensor}: this model has no {what[plan.split_scheme]} to split; choose another degree"
        )


def _size(unit: Unit) -> int:
    return math.prod(axis.size for axis in unit)


def _disjoint(units: Iterable[Unit]) -> list[Unit]:
    """Units that share no atom; the first one found stays."""
    taken: set[int] = set()
    kept = []
    for unit in units:
        unit_atoms = {id(atom) for axis in unit for atom in atoms(axis)}
        if not unit_atoms & taken:
            taken |= unit_atoms
            kept.append(unit)
    return kept


def _unchained(linears: Iterable[OpAxes], units: Iterable[Unit]) -> list[Unit]:
    """Units of which no linear contracts one to make another: splitting both would add a sum and save nothing."""
    partners: dict[int, set[int]] = {}
    for op_axes in linears:
        made, contracted = ({id(outermost(sub_axis)) for sub_axis in parts_of(axis)} for axis in _ends(op_axes))
        for one, others in ((made, contracted), (contracted, made)):
            for axis in one:
                partners.setdefault(axis, set()).update(others)
    kept: dict[int, Unit] = {}
    for unit in units:
        if not partners.get(id(unit[0]), set()) & kept.keys():
            kept[id(unit[0])] = unit
    return list(kept.values())


def _ends(op_axes: OpAxes) -> tuple[Axis, Axis]:
    """What a linear or a convolution makes and what it contracts."""
    dim = -1 if isinstance(op_axes.operator, LinearOp) else 1
    return op_axes.result_axes[0][dim], op_axes.operand_axes[0][dim]


def _summable(linears: Iterable[OpAxes], units: list[Unit], parts: int) -> list[Unit]:
    """Units without those that a linear contracts end to end with something that is not split.

    A contraction is a partial sum only where every part is split: another would be counted once by each rank.
    """
    joined = [axis for op_axes in linears if isinstance(axis := _ends(op_axes)[1], Concat)]
    while True:
        split = Split(TENSOR, parts, units)
        wrong = {
            id(outermost(sub_axis))
            for axis in joined
            if not split.splits(axis)
            for sub_axis in axis.parts
            if split.splits(sub_axis)
        }
        kept = [unit for unit in units if id(unit[0]) not in wrong]
        if len(kept) == len(units):
            return kept
        units = kept
