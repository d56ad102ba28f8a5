"""Which folder a cache of compiled programs is kept in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "XDIT_COMPILE_CACHE"
"""Environment variable that names the folder; empty or ``off``, nothing is kept."""
AUTO = "auto"
_NONE = ("", "off")


def resolve(cache: str | os.PathLike[str] | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The folder to keep compiled programs in, as an absolute path that need not be there yet; None for no cache.

    Args:
        cache: a folder; ``"auto"`` for the one that the environment names, or else this user's cache folder;
            ``None``, ``"off"`` or nothing at all for no cache.
        environment: where ``XDIT_COMPILE_CACHE`` is looked up.
    """
    chosen = environment.get(VARIABLE, AUTO) if cache == AUTO else cache
    if chosen is None or os.fspath(chosen) in _NONE:
        return None
    if chosen == AUTO:
        import platformdirs

        return platformdirs.user_cache_path("xdit_compile").absolute()
    return Path(chosen).expanduser().absolute()
