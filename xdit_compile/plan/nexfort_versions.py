"""Whether nexfort can be beside the torch that is installed, from what packages say of themselves. Imports no torch."""

from __future__ import annotations

import importlib.metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from .packages import version_of

NEWEST = ("0.1.dev330", "<=2.5.1,>=2.3.0")
"""The newest nexfort that is known here, of February 2025, and what it requires of torch by its own metadata."""
SOURCE = "https://github.com/siliconflow/onediff (src/onediff/infer_compiler/backends/nexfort)"
OTHERWISE = "use backend='inductor'"


def why_not() -> str | None:
    """Why the packages that are installed make it impossible, with what to do; None where they do not."""
    here = (version_of("torch") or "").partition("+")[0]
    version = version_of("nexfort")
    if version is None:
        newest, required = NEWEST
        if here and not SpecifierSet(required).contains(here, prereleases=True):
            return (
                f"nexfort is not installed, and its newest release that is known ({newest}) cannot be beside torch "
                f"{here}: it requires torch{required}; {OTHERWISE}"
            )
        return f"nexfort is not installed; it comes for CUDA from {SOURCE}, or {OTHERWISE}"
    if here and (wanted := _required_torch()) is not None and not wanted.contains(here, prereleases=True):
        return f"nexfort {version} requires torch{wanted}, and this is torch {here}; {OTHERWISE}"
    if version_of("onediff") is None:
        return f"onediff is not installed; run: pip install 'xdit-compile[onediff]', or {OTHERWISE}"
    return None


def _required_torch() -> SpecifierSet | None:
    """The releases of torch that the installed nexfort says it can be with; None where it does not say."""
    for line in importlib.metadata.requires("nexfort") or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.name == "torch" and requirement.marker is None:
            return requirement.specifier
    return None
