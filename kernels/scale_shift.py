"""Applying a norm whose statistics are known."""

from __future__ import annotations

import torch

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
_LIBRARY.define(
    "scale_shift(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    tags=(torch.Tag.pointwise, torch.Tag.pt2_compliant_tag),
)


@torch.library.impl(_LIBRARY, "scale_shift", "CompositeImplicitAutograd")
def scale_shift(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``x * scale + shift`` for every channel, computed in the dtype of the factors without a copy of ``x`` in it.

    Args:
        x: [batch, channels, ...], of any floating dtype.
        scale, shift: [batch, channels, 1, ...], float32, or float64 where ``x`` is.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: when batch or channels differ.
    """
    if not x.shape[:2] == scale.shape[:2] == shift.shape[:2]:
        sizes = ", ".join(str(tuple(each.shape)) for each in (x, scale, shift))
        raise ValueError(f"scale_shift of tensors of {sizes}: batch and channels must be the same")
    if not x.numel():
        return torch.empty_like(x)
    ones = scale.new_ones(scale.numel())
    rows = x.reshape(1, scale.numel(), -1)
    factors = scale.flatten(), shift.flatten(), torch.zeros_like(ones), ones
    return torch.native_batch_norm(rows, *factors, False, 0.0, 0.0)[0].reshape(x.shape)
