"""Whether a tensor was written to since it was seen."""

from __future__ import annotations

import torch


def version_of(tensor: torch.Tensor) -> int | None:
    """The number that every write in place raises; None for a tensor of ``torch.inference_mode()``, which has none."""
    return None if tensor.is_inference() else tensor._version
