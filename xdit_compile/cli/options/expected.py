"""What difference to one process is to be expected of a plan with stale values."""

from __future__ import annotations

from xdit_compile.plan import Plan
from xdit_compile.plan.methods import METHODS

_GREATEST = {"pipefusion": (4, 54, 231, 43), "distrifusion": (6, 68, 226, 42)}
"""Of 16 pictures of the embedded pipeline: the least, the median and the largest of their greatest differences in any
pixel, of 255, and the mean PSNR in dB (docs/evaluation.md)."""


def expected_difference(plan: Plan) -> str | None:
    """A line on the difference that is to be expected; None for a plan that is exact."""
    if not plan.is_stale:
        return None
    used = [method for method in METHODS if method.stale and plan.degree(method) > 1]
    titles = " and ".join(method.title for method in used) or "patches that follow one another"
    least, median, most, decibel = _GREATEST.get(used[0].name if used else "", _GREATEST["pipefusion"])
    return (
        f"a difference is expected: after warm-up, {titles} computes with values of the step before; in pictures of "
        f"the embedded pipeline (2 ranks, 20 steps, --warmup_steps 1) the greatest was {least} to {most} of 255, "
        f"with a median of {median}, and PSNR {decibel} dB (docs/evaluation.md); more warm-up steps make it less"
    )
