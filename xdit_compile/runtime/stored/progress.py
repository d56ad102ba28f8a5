"""What a person sees while a call is captured and compiled: which graph of how many, and for how long."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """A bar on the terminal; nothing where there is none, or where it is not this rank's to speak.

    Args:
        name: what is made ready.
        speaks: whether this rank shows anything.
    """

    def __init__(self, name: str, speaks: bool = False):
        self._name, self._speaks = name, speaks and sys.stderr.isatty()
        self._bar: Bar | None = None
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.perf_counter() - self._begun

    def stage(self, what: str) -> None:
        """Something begins of which nobody knows how long it takes."""
        self._show(f"{self._name}: {what}", None)

    def begin(self, total: int) -> None:
        """So many graphs are about to be compiled."""
        if total:
            self._show(f"{self._name}: compiling graphs", total)

    def step(self, count: int) -> None:
        """So many more are compiled."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], count)

    def end(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, text: str, total: int | None) -> None:
        if not self._speaks:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self.end()
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn()]
        columns += [MofNCompleteColumn()] if total is not None else []
        self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        self._bar.add_task(text, total=total)
        self._bar.start()
