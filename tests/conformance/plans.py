"""The plans of two ranks, and when one has nothing to split."""

from __future__ import annotations

from typing import Any

from conformance.observe import Reference

from xdit_compile import Plan

PLANS: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "tensor": {"tensor": 2},
    "cfg": {"cfg": 2},
    "data": {"data": 2},
    "pipefusion": {"pipefusion": 2},
    "distrifusion": {"distrifusion": 2},
    "vae": {"ulysses": 2, "vae": "patch"},
}

STALE = ("pipefusion", "distrifusion")
"""Plans of methods that are exact while they warm up."""


def plan_of(name: str, steps: int, timeout_s: float) -> Plan:
    """The plan of a name, by the backend that needs no compiler; stale methods warm up in all ``steps``."""
    return Plan(**PLANS[name], warmup_steps=steps, backend="eager", timeout_s=timeout_s)


def images_of(name: str) -> int:
    """Images of a request: as many as ranks that share them."""
    return PLANS[name].get("data", 1)


def nothing_to_split(name: str, reference: Reference) -> str:
    """Why a plan does not apply to what was seen unsplit; empty where it does."""
    if name == "cfg" and not reference.guided:
        return "no guidance seen in the unsplit run"
    if name == "vae" and not reference.codes:
        return "no autoencoder"
    return ""


def section_of(name: str) -> str:
    """Which work of a pipeline the plan splits."""
    return "coding" if name == "vae" else "denoising"
