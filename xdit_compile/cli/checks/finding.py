"""What a check found out about one thing."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence

OK, WARN, MISSING = STATES = ("ok", "warn", "missing")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of a report.

    Args:
        name: of the thing.
        state: one of `STATES`.
        said: what it is, or why it is not as it should be.
        remedy: what to do about it; empty where there is nothing to do.
        required: whether nothing can run without it.
    """

    name: str
    state: str
    said: str
    remedy: str = ""
    required: bool = False

    @property
    def fails(self) -> bool:
        """Whether something required is not there."""
        return self.required and self.state == MISSING


def output_of(command: Sequence[str], limit_s: float) -> tuple[str, str]:
    """What a command prints, and why it could not be had; one of the two is empty.

    Args:
        limit_s: how long it may take.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except FileNotFoundError:
        return "", f"{command[0]} is not there"
    except OSError as error:
        return "", f"{command[0]} cannot be run: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        return "", f"{command[0]} did not end within {limit_s:g} s"
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return "", f"{command[0]} failed: {lines[-1] if lines else f'exit code {done.returncode}'}"
    return done.stdout, ""


def size_said(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"
