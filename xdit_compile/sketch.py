"""A few numbers of a call's inputs: enough to see that another rank computes something else, cheap at any size."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

SAMPLES = 16
"""Values that are read of each tensor."""
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far sampled values of two ranks may lie apart, of their greatest; other dtypes must agree."""
UNCHANGED = "="
"""Stands for a tensor that was sketched before and not written to since."""


@functools.lru_cache(maxsize=256)
def _positions(count: int, device: torch.device) -> torch.Tensor:
    """Flat positions spread over ``count`` elements, the last among them."""
    if count <= SAMPLES:
        return torch.arange(count, device=device)
    return torch.tensor([round(k * (count - 1) / (SAMPLES - 1)) for k in range(SAMPLES)], device=device)


def samples(tensor: torch.Tensor) -> list[float]:
    """At most `SAMPLES` values of a tensor, spread over it; complex ones as pairs."""
    return _picked(tensor).tolist()


def _picked(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    positions = _positions(tensor.numel(), tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[positions]
    return tensor[torch.unravel_index(positions, tensor.shape)]


def sketch_of(leaf: Any) -> str:
    """What is said of one leaf to other ranks: dtype, shape and values of a tensor, nothing of anything else."""
    if not isinstance(leaf, torch.Tensor):
        return ""
    if not _has_values(leaf):
        return f"{_form(leaf)};{type(leaf).__name__}"
    return _text(_form(leaf), samples(leaf))


class Late:
    """The sketch of a tensor on an accelerator, whose values are on their way to the host.

    What is under way on the device is waited for when the text is asked for, and only as far as the tensor.
    """

    def __init__(self, tensor: torch.Tensor):
        self._form = _form(tensor)
        self._values = _picked(tensor).to("cpu", non_blocking=True)
        self._there = torch.Event(tensor.device)
        self._there.record()

    def text(self) -> str:
        """The sketch."""
        self._there.synchronize()
        return _text(self._form, self._values.tolist())


def sketch_late(leaf: Any) -> str | Late:
    """`sketch_of` a leaf, which waits for no device."""
    here = not isinstance(leaf, torch.Tensor) or leaf.device.type == "cpu" or not _has_values(leaf)
    return sketch_of(leaf) if here else Late(leaf)


def _has_values(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _text(form: str, values: Sequence[float]) -> str:
    return f"{form};{','.join(map(repr, values))}"


def alike(one: str, other: str) -> bool:
    """Whether two sketches differ by no more than rounding."""
    if one == other:
        return True
    (form, _, values), (other_form, _, other_values) = one.partition(";"), other.partition(";")
    dtype = getattr(torch, form.partition(" ")[0], None)
    if form != other_form or dtype not in ROUNDING:
        return False
    try:
        mine, theirs = ([float(value) for value in each.split(",")] for each in (values, other_values))
    except ValueError:
        return False
    return close(mine, theirs, ROUNDING[dtype])


def close(one: Sequence[float], other: Sequence[float], limit: float) -> bool:
    """Whether values lie within ``limit`` of the greatest finite one; infinities and NaNs must be the same."""
    if len(one) != len(other):
        return False
    allowed = limit * max((abs(value) for value in (*one, *other) if math.isfinite(value)), default=0.0)
    return all(a == b or (a != a and b != b) or abs(a - b) <= allowed for a, b in zip(one, other, strict=True))
