"""Compares what the partitioned program gives with what the module itself gives."""

from __future__ import annotations

from typing import Any

import torch

from .capture import relative_difference
from .errors import VerificationError
from .results import tensors_of

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Greatest difference, relative to the greatest value, that another order of summation can explain."""


def verify(found: Any, expected: Any) -> None:
    """Compare two results of one call, tensor by tensor.

    Raises:
        VerificationError: where they differ by more than rounding; the message says what to do.
    """
    for position, (one, other) in enumerate(zip(tensors_of(found), tensors_of(expected), strict=True)):
        alike = one.shape == other.shape and one.dtype == other.dtype
        difference = relative_difference(one, other) if alike else float("inf")
        limit = TOLERANCE.get(other.dtype, 0.0)
        if not difference <= limit:
            raise VerificationError(
                f"output {position} of the split program differs from the unsplit one by {difference:.1e} of its "
                f"greatest value (allowed {limit:.0e}); please report this model, and run it on one rank until then"
            )
