"""Where an element of a value comes from, through operators that only move elements."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from torch import fx

from xdit_compile.capture.mutations import named_arguments
from xdit_compile.ir.arguments import node_of, sequence_of
from xdit_compile.passes.memory.on_meta import Shapes, name_of

SAME = ("clone", "contiguous")
VIEWS = ("reshape", "view", "_unsafe_view")
Place = tuple[int, ...]


def source(
    node: fx.Node, place: Sequence[int], stops: Collection[fx.Node], shapes: Shapes
) -> tuple[fx.Node, Place] | None:  # fmt: skip
    """The node among ``stops`` that an element comes from, and its place there; None where it comes from elsewhere."""
    here = tuple(int(index) for index in place)
    while node not in stops:
        step = _before(node, here, shapes)
        if step is None:
            return None
        node, here = step
    return node, here


def _before(node: fx.Node, place: Place, shapes: Shapes) -> tuple[fx.Node, Place] | None:
    name = name_of(node) if node.op == "call_function" else ""
    if name in SAME:
        return node_of(node.args[0]), place
    if name in VIEWS:
        origin = node_of(node.args[0])
        flat = np.ravel_multi_index(place, tuple(shapes[node].shape)) if place else 0
        return origin, tuple(int(index) for index in np.unravel_index(flat, tuple(shapes[origin].shape)))
    arguments = named_arguments(node) if name in ("permute", "transpose", "cat") else {}
    if name == "permute":
        back = list(place)
        for dim, index in zip(arguments["dims"], place, strict=True):
            back[dim % len(place)] = index
        return node_of(node.args[0]), tuple(back)
    if name == "transpose":
        back, one, other = list(place), arguments["dim0"], arguments["dim1"]
        back[one], back[other] = back[other], back[one]
        return node_of(node.args[0]), tuple(back)
    if name == "cat":
        dim = (arguments.get("dim") or 0) % len(place)
        index = place[dim]
        for joined in map(node_of, sequence_of(arguments["tensors"])):
            if index < shapes[joined].shape[dim]:
                return joined, (*place[:dim], index, *place[dim + 1 :])
            index -= shapes[joined].shape[dim]
    return None
