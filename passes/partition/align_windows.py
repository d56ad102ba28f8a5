"""Splits what operators with windows make where the rows lie that they read."""

from __future__ import annotations

import dataclasses

from xdit_compile.ir.axes import Axis, Product
from xdit_compile.ir.sharding import Split
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.local.layout import Layout


def follow(inference: Inference, layout: Layout) -> Layout:
    """A layout in which the rows that windows make lie as those that they read.

    A convolution with a stride, a pad or a resize makes rows that are no multiple of what there was. Its result is
    split where its operand is, at the rows that need the fewest of other ranks.
    """
    splits = dict(layout.sharding.splits)
    for name in splits:
        splits[name] = _followed(inference, splits[name])
    return dataclasses.replace(layout, sharding=dataclasses.replace(layout.sharding, splits=splits))


def _followed(inference: Inference, split: Split) -> Split:
    for _, _, op_axes in inference.nodes():
        for loop in op_axes.loops:
            if loop.kind != "halo":
                continue
            ((_, dim),), ((_, out),) = loop.args, loop.outs
            read, made = op_axes.operand_axes[0][dim], op_axes.result_axes[0][out]
            if made.size == 1 or not split.splits(read) or split.splits(made):
                continue
            ends = split.ends(read)
            if ends is not None:
                split = Split(
                    split.dim, split.parts, split.units, {**split.cuts, **_cut(made, op_axes.windows[dim].ends(ends))}
                )
    return split


def _cut(axis: Axis, ends: tuple[int, ...]) -> dict[Axis, tuple[int, ...]]:
    """Cuts of an axis that give about these ends; of a product the outermost factor is cut."""
    if not isinstance(axis, Product):
        return {axis: ends}
    outer = axis.factors[0]
    inner = axis.size // outer.size
    return {outer: (*(min(round(end / inner), outer.size) for end in ends[:-1]), outer.size)}
