"""Environment variables that libraries read, where the user has not set them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

RUN_FOLDER = "XDIT_COMPILE_RUN"
"""Where the processes of one command put what must be gone when it ends; the command sets it for them."""


@contextmanager
def defaults(wanted: Mapping[str, str]) -> Iterator[None]:
    """Have variables set meanwhile, for this process and those that it starts; what the user has set stays."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
