"""What goes on, told in lines where there is no terminal: whole ones, without control characters."""

from __future__ import annotations

import sys
import threading
import time

FIRST_NOTICE_S = 5.0
"""After a silence of so long it is told what goes on; of the same thing again whenever that has doubled."""
LONGEST_SILENCE_S = 60.0
"""But never later than this after the last line."""


class Notices:
    """Tells what goes on once nothing was said for a while.

    Args:
        since: when somebody began to wait, in seconds of the monotonic clock, which processes of a machine have in
            common; another process told what went on until now.
    """

    def __init__(self, since: float):
        self._said = since + (time.monotonic() - since) // FIRST_NOTICE_S * FIRST_NOTICE_S
        self._wait = FIRST_NOTICE_S
        self._what, self._begun = "", since
        self._changed, self._over = threading.Event(), False
        self._thread: threading.Thread | None = None

    def begin(self, what: str) -> None:
        """Something goes on from now on; nothing that is told, where it is empty."""
        self._begun = time.monotonic() if self._thread is not None else self._begun
        self._what, self._wait = what, FIRST_NOTICE_S
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
        while not self._over:
            self._changed.clear()
            if self._changed.wait(max(0.0, self._said + self._wait - time.monotonic())):
                continue
            now = time.monotonic()
            if self._what:
                sys.stderr.write(f"{self._what} ({now - self._begun:.0f} s so far)\n")
                sys.stderr.flush()
            self._said, self._wait = now, min(2 * self._wait, LONGEST_SILENCE_S)


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
