"""How far results move where attention is computed by a provider that is not exact, and how far they may."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from xdit_compile.errors import VerificationError
from xdit_compile.ir.peak_memory import if_room
from xdit_compile.ir.results import tensors_of

MOST_APART = 0.15
"""Sum of differences over the sum of values: three times what rounding to bfloat16 may do to a row (`ROWS`)."""
LEAST_COSINE = 0.99
"""Of two results as vectors: that of a difference of 0.14 of the values' root mean square that has nothing of them."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """How far a result lies from the exact one, by the two measures in which SageAttention reports (arXiv:2410.02367).

    Args:
        apart: sum of absolute differences over the sum of absolute values.
        cosine: of the angle between the two as vectors.
    """

    apart: float = 0.0
    cosine: float = 1.0

    @classmethod
    def of(cls, one: torch.Tensor, other: torch.Tensor) -> Moved:
        """That of ``one`` from ``other``, which are of one shape; equal infinities and NaNs agree."""
        wide = torch.complex128 if other.is_complex() else torch.float64
        one, other = (x.to(wide).flatten() for x in (one, other))
        same = (one == other) | (one.isnan() & other.isnan())
        if same.all():
            return cls()
        one, other = (torch.where(same & ~other.isfinite(), 0, x) for x in (one, other))
        size, lengths = other.abs().sum(), (one.abs().square().sum() * other.abs().square().sum()).sqrt()
        apart, cosine = ((one - other).abs().sum() / size).item(), (torch.vdot(other, one).real / lengths).item()
        return cls(apart, cosine) if math.isfinite(apart) and math.isfinite(cosine) else cls(math.inf, -1.0)

    def or_more(self, other: Moved) -> Moved:
        """The greater of two in each respect."""
        return Moved(max(self.apart, other.apart), min(self.cosine, other.cosine))

    @property
    def allowed(self) -> bool:
        """Whether quantised attention explains it."""
        return self.apart <= MOST_APART and self.cosine >= LEAST_COSINE

    def __str__(self) -> str:
        return (
            f"{self.apart:.1e} of its values (at most {MOST_APART}), cosine similarity {self.cosine:.5f} "
            f"(at least {LEAST_COSINE})"
        )


def moved(actual: Any, expected: Any) -> Moved:
    """How far the worst tensor of a result lies from that of the exact one.

    Raises:
        VerificationError: their forms differ.
    """
    farthest = Moved()
    for position, (one, other) in enumerate(zip(tensors_of(actual), tensors_of(expected), strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise VerificationError(
                f"output {position} of the split program has another form; please report this model"
            )
        measured = functools.partial(Moved.of, one, other)
        farthest = farthest.or_more(if_room(measured, other.device) or Moved.of(one.cpu(), other.cpu()))
    return farthest


def refuse_far(distance: Moved, name: str, attention: str) -> None:
    """Refuse a result that quantised attention does not explain.

    Raises:
        VerificationError: with the size of the difference.
    """
    if not distance.allowed:
        raise VerificationError(
            f"attention={attention!r} moves what {name} gives by {distance}: too far; choose attention='auto'"
        )
