"""Notices writes that raise no version number, such as those through ``.data``, by a few values of each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SAMPLES = 64
GOLDEN = 0.382


class Sample:
    """About 64 values of a tensor as they were, and where they stand in it."""

    def __init__(self, tensor: torch.Tensor):
        self.there = strided(tensor)
        self.before = None if self.there is None else self.there.clone()


def strided(tensor: torch.Tensor) -> torch.Tensor | None:
    """A view of about 64 elements, in as many rows and columns; None of a tensor that leaves gaps in its memory."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.detach().permute(order)
    if not dense.is_contiguous():
        return None
    last, step = dense.shape[-1] if dense.dim() else 1, max(1, tensor.numel() // SAMPLES)
    if step > last:
        step -= int(GOLDEN * last)
    return dense.view(-1)[::step][:SAMPLES]


def changed(samples: Sequence[Sample]) -> set[int]:
    """Which of the tensors have other values now, by position; those that cannot be looked at count as such.

    All samples of one dtype and device are compared at once.
    """
    found = {at for at, sample in enumerate(samples) if sample.there is None}
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for at, sample in enumerate(samples):
        if sample.there is not None:
            kinds.setdefault((sample.there.dtype, sample.there.device), []).append(at)
    for members in kinds.values():
        if not _same([samples[at] for at in members]):
            found.update(at for at in members if not _same([samples[at]]))
    return found


def _same(samples: Sequence[Sample]) -> bool:
    there, before = (torch.cat(each).view(torch.uint8) for each in zip(*((s.there, s.before) for s in samples)))
    return torch.equal(there, before)
