"""From the way an axis is used it gets a role: tokens, heads, batch, ffn, channels, rows, columns, frames, hidden."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from torch import fx

from xdit_compile.ir.axes import Axis, atoms, parts_of

from .infer import Frame, Inference
from .operators import AttentionOp, ConvolutionOp, LinearOp
from .rule import OpAxes

PRECEDENCE = (
    "query tokens",
    "key tokens",
    "heads",
    "head channels",
    "frames",
    "rows",
    "columns",
    "hidden",
    "ffn",
    "channels",
    "batch",
)


@dataclasses.dataclass(frozen=True)
class Use:
    """An axis in a role, and the first node that uses it so."""

    axis: Axis
    role: str
    frame: Frame
    node: fx.Node


def roles(inference: Inference) -> list[Use]:
    """Every axis that has a role, in the order of `PRECEDENCE`; an axis may have several.

    Returns:
        One use for each axis and role, that of the first node. Feed-forward channels and channels between convolutions
        are told only of axes that share no atom with an axis of another role.
    """
    uses: dict[tuple[int, str], Use] = {}
    for frame, node, op_axes in inference.nodes():
        for axis, role in (*_attended(op_axes), *_convolved(op_axes), *_normalised(node, op_axes)):
            if axis.size > 1:
                uses.setdefault((id(axis), role), Use(axis, role, frame, node))
    taken = {id(atom) for use in uses.values() for atom in atoms(use.axis)}
    for use in (*_feed_forward(inference), *_convolved_channels(inference)):
        if not taken & {id(atom) for atom in atoms(use.axis)}:
            uses.setdefault((id(use.axis), use.role), use)
    return sorted(uses.values(), key=lambda use: PRECEDENCE.index(use.role))


def _attended(op_axes: OpAxes) -> Iterable[tuple[Axis, str]]:
    if not isinstance(op_axes.operator, AttentionOp):
        return
    queries, keys = op_axes.operand_axes[:2]
    tokens = op_axes.operator.tokens
    yield queries[tokens], "query tokens"
    yield keys[tokens], "key tokens"
    yield queries[tokens + 1], "head channels"
    for dim in range(tokens):
        yield queries[dim], "heads" if dim == tokens - 1 else "batch"


def _convolved(op_axes: OpAxes) -> Iterable[tuple[Axis, str]]:
    """The space that a convolution of more than one position slides over, and the rows and columns that it makes."""
    if not isinstance(op_axes.operator, ConvolutionOp) or max(op_axes.operator.kernel) == 1:
        return
    for axes in (op_axes.operand_axes[0], op_axes.result_axes[0]):
        names = ("frames", "rows", "columns")[5 - len(axes) :] if len(axes) > 3 else ("columns",)
        yield from zip(axes[2:], names, strict=False)


def _normalised(node: fx.Node, op_axes: OpAxes) -> Iterable[tuple[Axis, str]]:
    if "layer_norm" in str(node.target):
        for loop in op_axes.loops:
            if loop.kind == "whole":
                yield op_axes.operand_axes[0][loop.dims_of(0)[0]], "hidden"


def _feed_forward(inference: Inference) -> Iterable[Use]:
    """Axes that one linear makes and another contracts, on their own or laid end to end with others.

    Not those that convolutions make or contract as well: such a one runs through the whole model.
    """
    made: dict[int, Use] = {}
    contracted: set[int] = set()
    convolved: set[int] = set()
    for frame, node, op_axes in inference.nodes():
        if isinstance(op_axes.operator, LinearOp):
            contracted |= {id(axis) for axis in parts_of(op_axes.operand_axes[0][-1])}
            for axis in parts_of(op_axes.result_axes[0][-1]):
                made.setdefault(id(axis), Use(axis, "ffn", frame, node))
        elif sums_channels(op_axes):
            convolved |= {
                id(axis) for axes in (op_axes.operand_axes, op_axes.result_axes) for axis in parts_of(axes[0][1])
            }
    return [use for key, use in made.items() if key in contracted - convolved]


def _convolved_channels(inference: Inference) -> Iterable[Use]:
    """Channels that one convolution alone makes and another one alone contracts: those inside a residual block."""
    made: dict[int, list[Use]] = {}
    contracted: collections.Counter[int] = collections.Counter()
    for frame, node, op_axes in inference.nodes():
        if sums_channels(op_axes):
            contracted.update({id(axis) for axis in parts_of(op_axes.operand_axes[0][1])})
            for axis in {id(axis): axis for axis in parts_of(op_axes.result_axes[0][1])}.values():
                made.setdefault(id(axis), []).append(Use(axis, "channels", frame, node))
    return [uses[0] for key, uses in made.items() if len(uses) == 1 and contracted[key] == 1]


def sums_channels(op_axes: OpAxes) -> bool:
    """Whether an operator is a convolution of which every result sums over all channels."""
    return isinstance(op_axes.operator, ConvolutionOp) and op_axes.operator.groups == 1
