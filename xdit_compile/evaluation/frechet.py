"""The Frechet distance between two sets of pictures in the features of a network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from .distances import batches
from .features import load_features
from .intervals import Estimate, resampled

Extract = Callable[[np.ndarray], np.ndarray]
_RESAMPLES = 300
_LEAST = 2


def frechet_distance(features: np.ndarray, references: np.ndarray) -> float | None:
    """Between Gaussians fitted to both (Heusel et al., arXiv 1706.08500); ``None`` where either has fewer than two.

    Args:
        features, references: ``(n, width)`` and ``(m, width)``.
    """
    if min(len(features), len(references)) < _LEAST:
        return None
    metric = FrechetInceptionDistance(feature=_Given(features.shape[1]))
    metric.update(torch.from_numpy(references).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    return max(float(metric.compute()), 0.0)


def frechet_difference(one: np.ndarray, other: np.ndarray, references: np.ndarray) -> Estimate | None:
    """The distance of ``one`` to ``references`` less that of ``other``; its interval by resampling all three together.

    All are ``(n, width)`` and row ``i`` of each belongs to the same caption.
    """
    if len(one) < _LEAST:
        return None

    def difference(rows: np.ndarray) -> float:
        first, second = (frechet_distance(values[rows], references[rows]) for values in (one, other))
        assert first is not None and second is not None
        return first - second

    return resampled(np.arange(len(one)), difference, resamples=_RESAMPLES)


def scene_features() -> Extract:
    """Features ``(n, 64)`` of images ``(n, height, width, 3)``, uint8, by the network trained on drawn scenes."""
    net = load_features()
    return lambda images: np.concatenate([net(part).double().numpy() for part in batches(images)])


def inception_features(device: torch.device) -> Extract:
    """Features ``(n, 2048)`` of images ``(n, height, width, 3)``, uint8, by torch-fidelity's Inception network."""
    net = FrechetInceptionDistance(feature=2048).inception.to(device)

    def extract(images: np.ndarray) -> np.ndarray:
        parts = [(255 * part).round().byte().to(device) for part in batches(images)]
        with torch.no_grad():
            return np.concatenate([net(part).reshape(len(part), -1).double().cpu().numpy() for part in parts])

    return extract


class _Given(nn.Identity):
    """Stands where the metric expects a network: it is given features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width
