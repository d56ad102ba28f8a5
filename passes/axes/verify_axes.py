"""Whether axes fit the tensors that they describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from xdit_compile.errors import BrokenProgramError

from .infer import Axes, Inference
from .rule import values


def verify_axes(inference: Inference) -> None:
    """Compare the axes of every node with its shape.

    Raises:
        BrokenProgramError: an axis of another size than its dim, or not one for each dim.
    """
    _fit(inference.axes, "the root")
    for frame in inference.frames:
        _fit(frame.axes, str(frame.call.target))


def _fit(axes: Mapping[fx.Node, Sequence[Axes]], where: str) -> None:
    for node, results in axes.items():
        if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
            continue
        for tensor, dims in zip(values(node), results, strict=False):
            sizes = [axis.size for axis in dims]
            if sizes != list(tensor.shape):
                raise BrokenProgramError(f"{where}: {node.name} is {list(tensor.shape)}, and its axes are of {sizes}")
