"""Figures with the interval in which, at 95 % confidence, their true value lies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
_RESAMPLES = 5000
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; ``low`` and ``high`` are ``None`` where one sample says nothing of the spread."""

    value: float
    low: float | None = None
    high: float | None = None


def mean(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, its interval by the percentile bootstrap (Efron and Tibshirani 1993, ch. 13)."""
    return resampled(values, lambda sample: np.mean(sample, -1), vectorised=True)


def resampled(
    samples: Sequence[float] | np.ndarray,
    figure: Callable[..., float],
    vectorised: bool = False,
    resamples: int = _RESAMPLES,
) -> Estimate:
    """A figure of one-dimensional samples, its interval by the percentile bootstrap; the same at every call.

    Args:
        figure: of a resample to a number; of resamples along the last axis to numbers where it is ``vectorised``.
    """
    values = np.asarray(samples)
    value = float(figure(values))
    if len(values) < 2:
        return Estimate(value)
    bootstrap = stats.bootstrap(
        (values,),
        lambda sample, axis=-1: figure(sample),
        confidence_level=LEVEL,
        method="percentile",
        n_resamples=resamples,
        vectorized=vectorised,
        rng=np.random.default_rng(_SEED),
    )
    return Estimate(value, float(bootstrap.confidence_interval.low), float(bootstrap.confidence_interval.high))


def share(answers: Sequence[bool]) -> Estimate:
    """The share of at least one answer that is true, with Wilson's score interval (Wilson 1927)."""
    found = stats.binomtest(sum(answers), len(answers)).proportion_ci(LEVEL, method="wilson")
    return Estimate(sum(answers) / len(answers), float(found.low), float(found.high))


def paired_share_difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """The share of ``first`` less that of ``second`` over the same pairs, with the interval of Agresti and Min.

    Statistics in Medicine 24 (2005) 729: half a pair is added to each of the four outcomes, so that pairs which all
    agree still leave room for what more of them might show.
    """
    count = len(first)
    value = (sum(first) - sum(second)) / count
    only_first = sum(one and not other for one, other in zip(first, second, strict=True)) + 0.5
    only_second = sum(other and not one for one, other in zip(first, second, strict=True)) + 0.5
    centre = (only_first - only_second) / (count + 2)
    error = math.sqrt(only_first + only_second - (only_first - only_second) ** 2 / (count + 2)) / (count + 2)
    reach = float(stats.norm.ppf((1 + LEVEL) / 2)) * error
    return Estimate(value, max(centre - reach, -1.0), min(centre + reach, 1.0))
