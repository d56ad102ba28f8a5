"""The backends by name, and why one cannot be used here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xdit_compile.errors import ProviderUnavailable
from xdit_compile.plan import Plan
from xdit_compile.plan.nearest import unknown

from . import aot_eager, eager, inductor, nexfort
from .base import Backend

BEST_FIRST = ("inductor", "eager")
"""What ``auto`` tries; the last is always available."""


def backends(mode: str = "default", options: Mapping[str, Any] | None = None) -> dict[str, Backend]:
    """Every backend that ships; inductor in a mode of ``torch.compile``, and options for what takes any."""
    found = (inductor.Inductor(mode, options=options), nexfort.Nexfort(options), eager.Eager(), aot_eager.AotEager())
    return {backend.name: backend for backend in found}


def backend_of(plan: Plan) -> Backend:
    """The backend that a plan names, with its mode and options.

    Raises:
        ProviderUnavailable: it cannot be used here, with what to do about it.
    """
    return find_backend(plan.backend, plan.compile_mode, plan.options)


def why_not(plan: Plan) -> str | None:
    """Why the backend of a plan cannot be used here, in one line with what to do about it; None where it can."""
    try:
        backend_of(plan)
    except ProviderUnavailable as error:
        return str(error)
    return None


def find_backend(name: str, mode: str = "default", options: Mapping[str, Any] | None = None) -> Backend:
    """The backend of that name, or the best that can be used here for ``auto``.

    Raises:
        ProviderUnavailable: when it is unknown or cannot be used here, with what to do about it.
    """
    known = backends(mode, options)
    if name == "auto":
        asked = mode != "default" or bool(options)
        name = next(one for one in BEST_FIRST if asked or known[one].unavailable() is None)
    if name not in known:
        raise ProviderUnavailable(unknown(f"backend={name!r}", name, known))
    reason = known[name].unavailable()
    if reason is not None:
        raise ProviderUnavailable(f"backend={name!r} cannot be used here: {reason}")
    return known[name]
