"""The backends by name, and why one cannot be used here."""

from __future__ import annotations

from xdit_compile.errors import ProviderUnavailable

from . import eager, inductor, nexfort
from .base import Backend

BEST_FIRST = ("inductor", "eager")
"""What ``auto`` tries; the last is always available."""


def backends() -> dict[str, Backend]:
    """Every backend that ships."""
    return {backend.name: backend for backend in (inductor.Inductor(), nexfort.Nexfort(), eager.Eager())}


def find_backend(name: str) -> Backend:
    """The backend of that name, or the best that can be used here for ``auto``.

    Raises:
        ProviderUnavailable: when it is unknown or cannot be used here, with what to do about it.
    """
    known = backends()
    if name == "auto":
        return next(known[one] for one in BEST_FIRST if known[one].unavailable() is None)
    if name not in known:
        raise ProviderUnavailable(f"backend={name!r} is unknown; choose one of {', '.join(known)}")
    reason = known[name].unavailable()
    if reason is not None:
        raise ProviderUnavailable(f"backend={name!r} cannot be used here: {reason}")
    return known[name]
