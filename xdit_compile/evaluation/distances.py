"""Distances between two pictures of one caption and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from .features import FeatureNet

_TOGETHER = 16
_SMALLEST_SIDE = 11
_TINY = 1e-10


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far a picture lies from its reference, both with 8 bits.

    ``psnr`` is in dB and ``None`` for identical pictures, where it would be infinite; ``ssim`` is 1 for them, and
    ``None`` where a side has fewer than 11 pixels; ``perceptual`` is 0 for them; ``largest`` is the greatest difference
    of any value, of 255.
    """

    psnr: float | None
    ssim: float | None
    perceptual: float
    largest: int

    @property
    def identical(self) -> bool:
        """Whether no pixel differs."""
        return self.largest == 0


def distances(images: np.ndarray, references: np.ndarray, net: FeatureNet) -> list[Distance]:
    """The distance of each image from its reference; both ``(n, height, width, 3)``, uint8."""
    measurements = []
    for one, other in zip(batches(images), batches(references), strict=True):
        psnr = peak_signal_noise_ratio(one, other, data_range=1.0, reduction="none", dim=(1, 2, 3))
        largest = (255 * (one - other)).abs().amax((1, 2, 3)).round().int()
        ssim = _similarity(one, other)
        for index, (level, much) in enumerate(zip(psnr.tolist(), largest.tolist(), strict=True)):
            measurements.append(
                Distance(
                    level if much else None,
                    ssim[index].item() if ssim is not None else None,
                    perceptual(one[index : index + 1], other[index : index + 1], net).item(),
                    much,
                )
            )
    return measurements


def perceptual(one: torch.Tensor, other: torch.Tensor, net: FeatureNet) -> torch.Tensor:
    """The distance of Zhang et al. (arXiv 1801.03924) in the features of ``net``, without learnt weights: ``(n,)``.

    In each layer the channels of each place are scaled to length 1; their squared differences are summed over channels,
    averaged over places, summed over layers. Images are ``(n, 3, height, width)``, float32 from 0 to 1.
    """
    total = torch.zeros(len(one))
    for here, there in zip(net.layers(one), net.layers(other), strict=True):
        total += (_unit(here) - _unit(there)).square().sum(1).mean((1, 2))
    return total


def batches(images: np.ndarray, size: int = _TOGETHER) -> Iterator[torch.Tensor]:
    """Images ``(n, height, width, 3)``, uint8, in parts as ``(m, 3, height, width)``, float32 from 0 to 1."""
    for start in range(0, len(images), size):
        yield torch.from_numpy(images[start : start + size]).permute(0, 3, 1, 2).float() / 255


def _similarity(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor | None:
    if min(one.shape[-2:]) < _SMALLEST_SIDE:
        return None
    similarity = structural_similarity_index_measure(one, other, data_range=1.0, reduction="none")
    assert isinstance(similarity, torch.Tensor)
    # In float32 the variances of even areas are off by as much as 1e-4, so identical pictures would miss 1.
    same = (one == other).flatten(1).all(1)
    return torch.where(same, torch.ones(()), similarity.reshape(-1))


def _unit(value: torch.Tensor) -> torch.Tensor:
    return value / (value.square().sum(1, keepdim=True) + _TINY).sqrt()
