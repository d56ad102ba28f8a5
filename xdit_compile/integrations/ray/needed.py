"""Whether Ray is here, in a release that has what is used of it; told before anything of it is imported."""

from __future__ import annotations

from packaging.version import Version

from xdit_compile.errors import UsageError
from xdit_compile.plan.packages import version_of

OLDEST = "2.60"
"""Serve builds the front's application in its replica from this release on."""
COMMAND = "pip install 'xdit-compile[ray]'"


def check_ray() -> None:
    """See that Ray can be used.

    Raises:
        UsageError: it is not here, or too old.
    """
    version = version_of("ray")
    if version is None:
        raise UsageError(f"Ray is not installed; run: {COMMAND}")
    if Version(version) < Version(OLDEST):
        raise UsageError(f"Ray {version} is too old, {OLDEST} or newer is needed; run: {COMMAND}")
