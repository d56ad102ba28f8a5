"""Finds the tokens: what sequence parallelism splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xdit_compile.axes import Axis, Concat, Product
from xdit_compile.shards import Unit

from .flops import flops
from .infer import Inference


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Units to split together, and why they were thought of."""

    units: tuple[Unit, ...]
    name: str


def candidates(inference: Inference, parts: int) -> list[Candidate]:
    """Ways to split the tokens, those of the costliest attention first.

    Every part of a concatenation is split, or none. A flattened grid is cut flat, or by one of its factors: flat cuts are
    even, factors live on where the graph takes the grid apart.
    """
    found: dict[tuple[int, ...], Candidate] = {}
    for axis in _token_axes(inference):
        for style in ("factor", "flat"):
            for units in _styles(axis, style, parts):
                key = tuple(id(part) for unit in units for part in unit)
                found.setdefault(key, Candidate(units, f"{style} {axis!r}"))
    return list(found.values())


def _token_axes(inference: Inference) -> list[Axis]:
    weights: dict[int, tuple[Axis, float]] = {}
    for frame, node, typing in inference.nodes():
        if "attention" in typing.facts:
            dim = typing.facts["attention"]["tokens"]
            axes = [typing.expected[0][dim]]
        else:
            continue
        for axis in axes:
            weights[id(axis)] = (axis, weights.get(id(axis), (axis, 0.0))[1] + flops(node))
    return [axis for axis, _ in sorted(weights.values(), key=lambda pair: -pair[1])]


def _styles(axis: Axis, style: str, parts: int) -> list[tuple[Unit, ...]]:
    segments = axis.parts if isinstance(axis, Concat) else (axis,)
    if style == "flat":
        return [tuple(_flat(segment) for segment in segments)]
    best = tuple(_best_factor(segment, parts) for segment in segments)
    return [best]


def _flat(segment: Axis) -> Unit:
    return segment.factors if isinstance(segment, Product) else (segment,)


def _best_factor(segment: Axis, parts: int) -> Unit:
    factors: Sequence[Axis] = segment.factors if isinstance(segment, Product) else (segment,)
    return (min(factors, key=lambda factor: -(-factor.size // parts) / factor.size),)
