"""What the makers of cards say of them: the two figures that bound a kernel."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Peak:
    """What the makers of a card say of it.

    Args:
        flops: of dense products of bfloat16 in a second.
        bandwidth: bytes of its memory in a second.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """At best, for one kernel."""
        return max(flops / self.flops, moved / self.bandwidth)


PEAKS = {
    "sm_80": Peak(312e12, 2.039e12),
    "sm_90": Peak(989e12, 3.35e12),
    "sm_100": Peak(2250e12, 8e12),
    "sm_120": Peak(209.5e12, 1.792e12),
}
"""Of the cards of `CARDS`, by target."""
