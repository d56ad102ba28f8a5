"""What goes on, told in lines where there is no terminal: whole ones, without control characters."""

from __future__ import annotations

import sys
import threading
import time

SILENCE_S = 4.0
"""After a silence of so long it is told what goes on: nobody looks at nothing for 5 s, busy as a machine may be."""


class Notices:
    """Tells what goes on whenever nothing was told for a while.

    Args:
        since: when somebody began to wait, in seconds of the monotonic clock, which processes of a machine have in
            common.
    """

    def __init__(self, since: float):
        self._said = since
        self._what, self._begun = "", since
        self._changed, self._over = threading.Event(), False
        self._thread: threading.Thread | None = None

    def begin(self, what: str) -> None:
        """Something goes on from now on; nothing that is told, where it is empty."""
        self._begun = time.monotonic() if self._thread is not None else self._begun
        self._what = what
        self._changed.set()
        if self._thread is None and not self._over:
            self._thread = threading.Thread(target=self._tell, name="notices", daemon=True)
            self._thread.start()

    def goes_on(self, what: str) -> None:
        """The same thing goes on, and has come so far."""
        self._what = what

    def end(self) -> None:
        """Nothing goes on any more."""
        self._over = True
        self._changed.set()

    def _tell(self) -> None:
        while True:
            self._changed.clear()
            if self._over:
                return
            left = max(0.0, self._said + SILENCE_S - time.monotonic()) if self._what else None
            if self._changed.wait(left):
                continue
            self._said = time.monotonic()
            seconds = int(self._said - self._begun) or "under 1"
            sys.stderr.write(f"{self._what} ({seconds} s so far)\n")
            sys.stderr.flush()


class StepLines:
    """Where a bar of steps writes: what it shows is told as what goes on, in lines.

    Args:
        notices: which tell it.
    """

    def __init__(self, notices: Notices):
        self._notices = notices

    def write(self, text: str) -> int:
        """Take what the bar shows next."""
        shown = text.strip()
        if shown:
            self._notices.goes_on(shown)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""
