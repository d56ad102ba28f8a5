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


COMING = "?"
"""Stands for values that are still on their way from a device."""


class Coming:
    """A sketch whose values are on their way from a device to the host, which does not wait for them.

    Args:
        form: of the tensor, in words.
        values: few, on a device; copied in the order of the current stream.
    """

    def __init__(self, form: str, values: torch.Tensor):
        self._form = form
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._arrival = torch.Event(values.device.type)
        self._arrival.record()

    def text(self, wait: bool = False) -> str:
        """The sketch, with `COMING` for values that are not here and are not waited for."""
        if wait:
            self._arrival.synchronize()
        return _said(self._form, self._values) if self._arrival.query() else f"{self._form};{COMING}"


Sketch = str | Coming


@functools.lru_cache(maxsize=256)
def _positions(count: int, device: torch.device) -> torch.Tensor:
    """Flat positions spread over ``count`` elements, the last among them."""
    if count <= SAMPLES:
        return torch.arange(count, device=device)
    return torch.tensor([round(k * (count - 1) / (SAMPLES - 1)) for k in range(SAMPLES)], device=device)


def _picked(tensor: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLES` values of a tensor, spread over it; complex ones as pairs."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    positions = _positions(tensor.numel(), tensor.device)
    if tensor.is_contiguous():
        return tensor.view(-1)[positions]
    return tensor[torch.unravel_index(positions, tensor.shape)]


def samples(tensor: torch.Tensor) -> list[float]:
    """At most `SAMPLES` values of a tensor, spread over it; complex ones as pairs. Waits for the device."""
    return _picked(tensor).tolist()


def sketch_of(leaf: Any) -> str:
    """What is said of one leaf to other ranks: dtype, shape and values of a tensor, nothing of anything else."""
    form = _form(leaf)
    return _said(form, _picked(leaf)) if form and _has_values(leaf) else form


def begin_sketch(leaf: Any) -> Sketch:
    """The same without waiting for a device that the tensor lies on."""
    if isinstance(leaf, torch.Tensor) and leaf.device.type not in ("cpu", "meta") and _has_values(leaf):
        return Coming(_form(leaf), _picked(leaf))
    return sketch_of(leaf)


def _form(leaf: Any) -> str:
    if not isinstance(leaf, torch.Tensor):
        return ""
    form = f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
    return form if _has_values(leaf) else f"{form};{type(leaf).__name__}"


def _has_values(leaf: torch.Tensor) -> bool:
    return type(leaf) in (torch.Tensor, torch.nn.Parameter) and not leaf.is_meta


def _said(form: str, values: torch.Tensor) -> str:
    return f"{form};{','.join(map(repr, values.tolist()))}"


def alike(one: str, other: str) -> bool:
    """Whether two sketches differ by no more than rounding, as far as they are known."""
    if one == other:
        return True
    (form, _, values), (other_form, _, other_values) = one.partition(";"), other.partition(";")
    if COMING in (values, other_values):
        return form == other_form
    dtype = getattr(torch, form.partition(" ")[0], None)
    if form != other_form or dtype not in ROUNDING:
        return False
    try:
        mine, theirs = ([float(value) for value in each.split(",")] for each in (values, other_values))
    except ValueError:
        return False
    return close(mine, theirs, ROUNDING[dtype])


def is_complete(sketch: str) -> bool:
    """Whether all of a sketch is known."""
    return not sketch.endswith(f";{COMING}")


def close(one: Sequence[float], other: Sequence[float], limit: float) -> bool:
    """Whether values lie within ``limit`` of the greatest finite one; infinities and NaNs must be the same."""
    if len(one) != len(other):
        return False
    allowed = limit * max((abs(value) for value in (*one, *other) if math.isfinite(value)), default=0.0)
    return all(a == b or (a != a and b != b) or abs(a - b) <= allowed for a, b in zip(one, other, strict=True))
