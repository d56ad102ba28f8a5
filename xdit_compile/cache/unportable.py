"""The error for what plain data cannot say, and a word on where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Unportable(ValueError):
    """Something that cannot be described in plain data, or a description that stands for nothing here."""


@contextmanager
def inside(where: str) -> Iterator[None]:
    """Have errors of what is done here begin with where that is.

    Raises:
        Unportable: the same as inside, with ``where`` before its words.
    """
    try:
        yield
    except Unportable as error:
        raise Unportable(f"{where}: {error}") from error
