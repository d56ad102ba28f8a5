"""Files that are kept for a while for those who asked for a URL; in memory alone."""

from __future__ import annotations

import dataclasses
import secrets
import time

from .settings import Keep


@dataclasses.dataclass(frozen=True)
class File:
    """A file that is kept.

    Args:
        data: its bytes.
        type: its media type.
        until: on `time.monotonic`'s clock.
    """

    data: bytes
    type: str
    until: float


class Results:
    """Files under names that cannot be guessed; the oldest go where there are too many.

    Args:
        keep: how many, how large and for how long.
    """

    def __init__(self, keep: Keep):
        self._keep = keep
        self._files: dict[str, File] = {}
        self._bytes = 0

    def put(self, data: bytes, type: str, ending: str) -> str | None:
        """Keep a file, and give its name; None where it alone is more than may be kept.

        Args:
            ending: of the name, such as ``png``.
        """
        if len(data) > self._keep.bytes or self._keep.count < 1:
            return None
        self._forget_old()
        while self._files and (len(self._files) >= self._keep.count or self._bytes + len(data) > self._keep.bytes):
            self.drop(next(iter(self._files)))
        name = f"{secrets.token_urlsafe(32)}.{ending}"
        self._files[name] = File(data, type, time.monotonic() + self._keep.seconds)
        self._bytes += len(data)
        return name

    def get(self, name: str) -> File | None:
        """A file, None where there is none of that name any more."""
        self._forget_old()
        return self._files.get(name)

    def drop(self, name: str) -> None:
        """Forget a file, if it is here."""
        gone = self._files.pop(name, None)
        self._bytes -= len(gone.data) if gone else 0

    def _forget_old(self) -> None:
        now = time.monotonic()
        while self._files and (oldest := next(iter(self._files))) and self._files[oldest].until < now:
            self.drop(oldest)
