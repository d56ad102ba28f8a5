"""Which releases of the libraries that this package stands on are too old for it, told before any is imported."""

from __future__ import annotations

import re

from xdit_compile.errors import UsageError

from .packages import version_of

OLDEST = {"torch": (2, 11), "diffusers": (0, 42), "transformers": (5,)}
"""The oldest release of each; the same as in pyproject.toml."""


def too_old() -> list[str]:
    """One clause for each library that is too old, with what to do; one that is not installed is told by its import."""
    problems = []
    for name, oldest in OLDEST.items():
        version = version_of(name)
        numbers = re.match(r"\d+(?:\.\d+)*", version or "")
        if numbers is not None and tuple(map(int, numbers[0].split("."))) < oldest:
            wanted = ".".join(map(str, oldest))
            problems.append(f"{name} {version} is too old for xdit_compile: pip install -U '{name}>={wanted}'")
    return problems


def check_requirements() -> None:
    """See that no library is too old.

    Raises:
        UsageError: naming every one that is.
    """
    if problems := too_old():
        raise UsageError("; ".join(problems))
