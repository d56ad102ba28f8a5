"""Finds the batch: the axis along which a call is several independent ones."""

from __future__ import annotations

from torch import fx

from xdit_compile.axes import Atom, Axis, Concat, same

from .infer import Inference
from .layout import BATCH, DATA, Chosen
from .tokens import Units


def choose_batch(inference: Inference, data: int, cfg: int) -> Chosen:
    """What gives every rank whole entries of the batch: over all these ranks, or over the ``data`` ranks alone.

    The batch is the outermost axis that an input and a result have in common. Guidance branches that a pipeline stacks
    are halves of it, and so are several images: nothing needs to know which.
    """
    over_all = _units(inference, data * cfg)
    return {BATCH: over_all, DATA: () if over_all else _units(inference, data)}


def _units(inference: Inference, parts: int) -> Units:
    """The batch, if it has an entry for each of several parts; where a graph takes it apart, each of its pieces has."""
    pieces = () if parts == 1 else batch_pieces(inference)
    return () if any(piece.size < parts for piece in pieces) else tuple((piece,) for piece in pieces)


def batch_pieces(inference: Inference) -> tuple[Axis, ...]:
    """The atoms that, end to end, are the first dim of the results and of the largest input that has it."""
    users = {given.name for given in inference.program.inputs if given.kind == "user"}
    root = inference.program.root.graph
    entering = [
        inference.axes[node][0][0]
        for node in root.find_nodes(op="placeholder")
        if node.name in users and inference.axes[node][0]
    ]
    (output,) = root.find_nodes(op="output")
    for leaf in output.args[0]:
        axes = inference.axes[leaf][0] if isinstance(leaf, fx.Node) else ()
        if axes and any(same(axes[0], axis) for axis in entering):
            pieces = axes[0].parts if isinstance(axes[0], Concat) else (axes[0],)
            if all(isinstance(piece, Atom) for piece in pieces):
                return tuple(dict.fromkeys(pieces))
    return ()
