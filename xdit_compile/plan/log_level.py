"""How much the package logs, where the environment says so; in programs of others and on the command line alike."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from xdit_compile.errors import UsageError

VARIABLE = "XDIT_COMPILE_LOG"
"""Environment variable that names the level."""
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


def log_level(environment: Mapping[str, str] = os.environ) -> int | None:
    """The level that ``XDIT_COMPILE_LOG`` asks for; None where it is not set, or empty.

    Raises:
        UsageError: it is no level.
    """
    asked = environment.get(VARIABLE, "").strip()
    if asked and asked.lower() not in LEVELS:
        raise UsageError(f"{VARIABLE}={asked} is no level; give one of {', '.join(LEVELS)}")
    return LEVELS[asked.lower()] if asked else None


def set_log_level() -> None:
    """Have our logger at the level that the environment asks for, on stderr where the program has no log of its own.

    A level that the program has set for it stays.

    Raises:
        UsageError: it asks for what is no level.
    """
    level, ours = log_level(), logging.getLogger("xdit_compile")
    if level is None or ours.level != logging.NOTSET:
        return
    if not ours.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
        ours.addHandler(handler)
    ours.setLevel(level)
