"""Compares what the partitioned program gives with what the module itself gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .capture import relative_difference
from .errors import VerificationError
from .results import tensors_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Greatest difference, relative to the greatest value, that another order of summation can explain."""


def verify(found: Any, expected: Any) -> None:
    """Compare two results of the call that a program was made for, tensor by tensor.

    Raises:
        VerificationError: where they differ by more than rounding; the message says what to do.
    """
    for position, difference, limit in _differences(found, expected):
        raise VerificationError(
            f"output {position} of the split program differs from the unsplit one by {difference:.1e} of its "
            f"greatest value (allowed {limit:.0e}); please report this model, and run it on one rank until then"
        )


def verify_later(found: Any, expected: Any, name: str) -> None:
    """Compare two results of a call for which a program was there already.

    Raises:
        VerificationError: where they differ by more than rounding.
    """
    for position, difference, limit in _differences(found, expected):
        raise VerificationError(
            f"output {position} of {name} was right in the first call and differs in a later one by {difference:.1e} "
            f"of its greatest value (allowed {limit:.0e}): something in it goes by what stands outside of it, as a "
            "count of steps that a pipeline or a function keeps; switch that off, or run it on one rank"
        )


def _differences(found: Any, expected: Any) -> Iterator[tuple[int, float, float]]:
    for position, (one, other) in enumerate(zip(tensors_of(found), tensors_of(expected), strict=True)):
        alike = one.shape == other.shape and one.dtype == other.dtype
        difference = relative_difference(one, other) if alike else float("inf")
        limit = TOLERANCE.get(other.dtype, 0.0)
        if not difference <= limit:
            yield position, difference, limit
