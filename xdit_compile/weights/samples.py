"""Notices writes that raise no version number, such as those through ``.data``, by a few values of each tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

SAMPLES = 64
GOLDEN = 0.382


class Sample:
    """About 64 values of a tensor as they were, and where they stand in it."""

    def __init__(self, tensor: torch.Tensor):
        self.there = strided(tensor)
        self.before = None if self.there is None else self.there.clone(memory_format=torch.contiguous_format)


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


class Samples:
    """Samples of many tensors, compared in one operation for each dtype and device.

    Args:
        samples: may be of one tensor more than once.
    """

    def __init__(self, samples: Sequence[Sample]):
        self._unseen = {position for position, sample in enumerate(samples) if sample.there is None}
        self._groups: dict[tuple[torch.dtype, torch.device], _Group] = {}
        for position, sample in enumerate(samples):
            if sample.there is not None and sample.before is not None:
                kind = (sample.there.dtype, sample.there.device)
                self._groups.setdefault(kind, _Group()).add(position, sample.there, sample.before)

    def changed(self) -> set[int]:
        """Which of the tensors have other values now, by position; those that cannot be looked at count as such."""
        return self._unseen.union(*(group.changed() for group in self._groups.values()))


class _Group:
    """Samples of one dtype on one device."""

    def __init__(self) -> None:
        self._at: list[int] = []
        self._there: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []

    def add(self, position: int, there: torch.Tensor, before: torch.Tensor) -> None:
        self._at.append(position)
        self._there.append(there)
        self._before.append(before)

    @functools.cached_property
    def _all(self) -> torch.Tensor:
        return torch.cat(self._before)

    def changed(self) -> set[int]:
        if _same(torch.cat(self._there), self._all):
            return set()
        triples = zip(self._at, self._there, self._before, strict=True)
        return {at for at, there, before in triples if not _same(there.contiguous(), before)}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two dense tensors are equal bit by bit."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
