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

Sketch = list[Any]
"""For each leaf ``[dtype, shape, values]`` of a tensor or the text of anything else."""


@functools.lru_cache(maxsize=256)
def _positions(count: int) -> torch.Tensor:
    """Flat positions spread over ``count`` elements, the last among them."""
    if count <= SAMPLES:
        return torch.arange(count)
    return torch.tensor([round(k * (count - 1) / (SAMPLES - 1)) for k in range(SAMPLES)])


def samples(tensor: torch.Tensor) -> list[float]:
    """At most `SAMPLES` values of a tensor, spread over it; complex ones as pairs."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = tensor.reshape(-1) if tensor.is_contiguous() else None
    positions = _positions(tensor.numel())
    if flat is not None:
        return flat[positions.to(flat.device)].tolist()
    return tensor[tuple(torch.unravel_index(positions.to(tensor.device), tensor.shape))].tolist()


def sketch_of(leaf: Any) -> Any:
    """What is said of one leaf to other ranks."""
    if type(leaf) in (torch.Tensor, torch.nn.Parameter):
        return [str(leaf.dtype), list(leaf.shape), samples(leaf) if not leaf.is_meta else []]
    if isinstance(leaf, torch.Tensor):
        return [str(leaf.dtype), list(leaf.shape), type(leaf).__name__]
    return None


def alike(one: Any, other: Any) -> bool:
    """Whether two sketches differ by no more than rounding."""
    if not isinstance(one, list) or not isinstance(other, list):
        return one == other
    if one[:2] != other[:2] or not isinstance(one[2], list) or not isinstance(other[2], list):
        return one == other
    return close(one[2], other[2], ROUNDING.get(getattr(torch, one[0].removeprefix("torch.")), 0.0))


def close(one: Sequence[float], other: Sequence[float], limit: float) -> bool:
    """Whether values lie within ``limit`` of the greatest finite one; infinities and NaNs must be the same."""
    if len(one) != len(other):
        return False
    finite = [abs(value) for value in (*one, *other) if math.isfinite(value)]
    allowed = limit * max(finite, default=0.0)
    return all(a == b or (a != a and b != b) or abs(a - b) <= allowed for a, b in zip(one, other, strict=True))
