"""Finds heads and feed-forward channels: what tensor parallelism splits."""

from __future__ import annotations

from collections.abc import Iterable

from xdit_compile.axes import Axis, Concat, Product, atoms
from xdit_compile.plan import Plan
from xdit_compile.shards import Unit

from .infer import Inference
from .roles import roles
from .tokens import Units


def choose_features(inference: Inference, plan: Plan) -> Units:
    """The units of heads and feed-forward channels that ``plan.split_scheme`` names; none with one tensor rank."""
    if plan.tensor == 1:
        return ()
    wanted = {"heads": ("heads",), "ffn": ("ffn",), "all": ("heads", "ffn")}[plan.split_scheme]
    found: dict[int, Unit] = {}
    for use in roles(inference):
        if use.role in wanted:
            for axis in _parts(use.axis):
                unit = _outermost(axis)
                if unit.size > 1:
                    found.setdefault(id(unit), (unit,))
    return tuple(_disjoint(found.values()))


def _parts(axis: Axis) -> Iterable[Axis]:
    return axis.parts if isinstance(axis, Concat) else (axis,)


def _outermost(axis: Axis) -> Axis:
    """Query heads are key heads times a group: whole groups stay together."""
    return axis.factors[0] if isinstance(axis, Product) else axis


def _disjoint(units: Iterable[Unit]) -> list[Unit]:
    """Units that share no atom; the first one found stays."""
    taken: set[int] = set()
    kept = []
    for unit in units:
        own = {id(atom) for axis in unit for atom in atoms(axis)}
        if not own & taken:
            taken |= own
            kept.append(unit)
    return kept
