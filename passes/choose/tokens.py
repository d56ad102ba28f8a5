"""Finds the tokens: what sequence parallelism splits.

Every attention names a token axis. A flattened grid can be cut flat, which is even, or by one of its factors, which
lives on where the graph takes the grid apart. What is better shows when the program is partitioned on paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.axes import Axis, Product, atoms, parts_of
from xdit_compile.ir.sharding import Split, Unit
from xdit_compile.passes.axes.flops import flops, portion
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.axes.operators import AttentionOp
from xdit_compile.passes.axes.rule import OpAxes
from xdit_compile.passes.local.layout import Layout
from xdit_compile.passes.local.ledger import STALE, Ledger
from xdit_compile.passes.partition.program import partition
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import MEMBERS, PATCH, SEQUENCE

MOST_FAMILIES = 6
"""Token axes that are tried, costliest attention first."""
MOST_FACTORS = 2
"""Factors of a grid that are tried, most even share first; the outermost one too, whose parts are neighbouring rows."""
FLOPS_PER_BYTE = 100.0
"""How much arithmetic a byte on the wire is worth when ways to split are compared."""

BLOCKING = 20.0
"""How many bytes of a planned exchange one gathered byte inside a repeated block is worth."""

Units = tuple[Unit, ...]


def choose_tokens(inference: Inference, plan: Plan, name: str = SEQUENCE) -> Units:
    """The units whose split over the plan's ranks costs least; none when the program has no tokens.

    Args:
        name: which ranks: those that wait for one another, or those of `PATCH` that do not.
    """
    parts = Mesh.simulated(plan, 0).size(MEMBERS[name])
    if parts == 1:
        return ()
    chosen: Units = ()
    lowest = float("inf")
    for axis in token_axes(inference)[:MOST_FAMILIES]:
        if chosen and Split(name, parts, chosen).splits(axis):
            continue
        tried = [chosen + units for units in ways(axis, parts) if not _overlap(chosen + units, units)]
        if not tried:
            continue
        costs = [_cost(inference, plan, name, units) for units in tried]
        if min(costs) < lowest:
            lowest = min(costs)
            chosen = tried[costs.index(lowest)]
    return chosen


def _cost(inference: Inference, plan: Plan, name: str, units: Units) -> float:
    layout = Layout.of(plan, Mesh.simulated(plan, 0), {name: units})
    return weigh(partition(inference, dataclasses.replace(layout, stale=name == PATCH)).ledger)


def weigh(ledger: Ledger) -> float:
    """The cost of one call on the busiest rank, in floating-point operations.

    A gather inside a repeated block stands in the way of everything after it, and weighs more than a planned exchange;
    an exchange that nobody waits for weighs nothing.
    """
    moved = sum(collective.bytes for collective in ledger.collectives if collective.op != STALE)
    blocking = sum(gather.bytes for gather in ledger.gathers if gather.place.repeated)
    return ledger.flops_here + FLOPS_PER_BYTE * (moved + BLOCKING * blocking)


def token_axes(inference: Inference) -> list[Axis]:
    """The query tokens of every attention, costliest first; after them what products of activations are summed over."""
    attended: dict[int, tuple[Axis, float]] = {}
    contracted: dict[int, tuple[Axis, float]] = {}
    for frame, node, op_axes in inference.nodes():
        work = flops(node)
        if isinstance(op_axes.operator, AttentionOp):
            _add(attended, _attended(op_axes, op_axes.operator), work)
        elif work and not any(operand in frame.tables for operand in op_axes.operands):
            for loop in op_axes.loops:
                if loop.kind == "sum":
                    operand, dim = loop.args[0]
                    _add(contracted, op_axes.operand_axes[operand][dim], work)
    return [*_heaviest(attended), *_heaviest({key: pair for key, pair in contracted.items() if key not in attended})]


def _attended(op_axes: OpAxes, attention: AttentionOp) -> Axis:
    """The query tokens of an attention, with the key tokens where queries attend to themselves among others."""
    queries, keys = (axes[attention.tokens] for axes in op_axes.operand_axes[:2])
    among = {id(part) for part in parts_of(queries)}
    return keys if among < {id(part) for part in parts_of(keys)} else queries


def _add(weights: dict[int, tuple[Axis, float]], axis: Axis, work: float) -> None:
    weights[id(axis)] = (axis, weights.get(id(axis), (axis, 0.0))[1] + work)


def _heaviest(weights: dict[int, tuple[Axis, float]]) -> list[Axis]:
    return [axis for axis, _ in sorted(weights.values(), key=lambda pair: -pair[1]) if axis.size > 1]


def ways(axis: Axis, parts: int) -> Iterator[Units]:
    """Ways to cut every segment of a token axis: by a factor that as many segments as possible share, or flat.

    Args:
        parts: into how many it is cut; factors that divide more evenly come first.

    Yields:
        One unit for each segment, in order.
    """
    segments = parts_of(axis)
    seen = set()
    factors = _all_factors(segments)
    even = sorted(factors, key=lambda factor: _largest_share(factor, parts))[:MOST_FACTORS]
    for factor in dict.fromkeys([*even, factors[0]]):
        units = tuple(_by_factor(segment, factor, parts) for segment in segments)
        if units not in seen:
            seen.add(units)
            yield units
    flat = tuple(_flat(segment) for segment in segments)
    if flat not in seen:
        yield flat


def _all_factors(segments: Sequence[Axis]) -> list[Axis]:
    grids = [segment.factors for segment in segments if isinstance(segment, Product)]
    return list(dict.fromkeys(factor for grid in grids for factor in grid)) or [segments[0]]


def _by_factor(segment: Axis, wanted: Axis, parts: int) -> Unit:
    factors = segment.factors if isinstance(segment, Product) else (segment,)
    return (wanted,) if wanted in factors else (min(factors, key=lambda factor: _largest_share(factor, parts)),)


def _largest_share(factor: Axis, parts: int) -> float:
    return portion(-(-factor.size // parts), factor.size)


def _overlap(chosen: Units, units: Units) -> bool:
    """Whether an atom would be cut in two ways."""
    cut = {id(atom): unit for unit in chosen for axis in unit for atom in atoms(axis)}
    return any(cut.get(id(atom), unit) != unit for unit in units for axis in unit for atom in atoms(axis))


def _flat(segment: Axis) -> Unit:
    return tuple(segment.factors) if isinstance(segment, Product) else (segment,)
