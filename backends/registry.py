"""The backends by name, and why one cannot be used here."""

from __future__ import annotations

from xdit_compile.errors import ProviderUnavailable

from . import aot_eager, eager, inductor, nexfort
from .base import Backend

BEST_FIRST = ("inductor", "eager")
"""What ``auto`` tries; the last is always available."""


def backends(mode: str = "default") -> dict[str, Backend]:
    """Every backend that ships; inductor in a mode of ``torch.compile``."""
    found = (inductor.Inductor(mode), nexfort.Nexfort(), eager.Eager(), aot_eager.AotEager())
    return {backend.name: backend for backend in found}


def find_backend(name: str, mode: str = "default") -> Backend:
    """The backend of that name, or the best that can be used here for ``auto``.

    Raises:
        ProviderUnavailable: when it is unknown or cannot be used here, with what to do about it.
    """
    known = backends(mode)
    if name == "auto":
        name = next(one for one in BEST_FIRST if mode != "default" or known[one].unavailable() is None)
    if name not in known:
        raise ProviderUnavailable(f"backend={name!r} is unknown; choose one of {', '.join(known)}")
    reason = known[name].unavailable()
    if reason is not None:
        raise ProviderUnavailable(f"backend={name!r} cannot be used here: {reason}")
    return known[name]
