"""What goes on while a call is captured and compiled, told to logs and to other ranks, and where the time went.

A person who reads the log ``xdit_compile.progress`` at the level INFO has one line for each phase. Records say the
same as values (`Phase`, under ``phase``), for whoever draws them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

phases = logging.getLogger("xdit_compile.progress")
times = logging.getLogger("xdit_compile.times")
Tell = Callable[[str, bool], None]
"""Is told what a rank does, and whether that takes as long as it takes."""
LEAST_S = 0.05
"""Phases that took less are not listed."""


class Phase(NamedTuple):
    """What begins, or how far it has come.

    Args:
        text: in words; empty where it is over.
        total: its parts, where their number is known.
        done: how many of them are done.
    """

    text: str
    total: int | None = None
    done: int = 0


class Times:
    """Where the time of a request goes: to phases that make its calls ready, to its steps, and before and after them.

    Seconds are those of the host: what a device has not done yet when its last step is called counts as after it.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A request begins."""
        self._begun = time.perf_counter()
        self._phases: dict[str, float] = {}
        self._first = self._last = 0.0
        self._inside = 0.0

    def add(self, what: str, seconds: float) -> None:
        """A phase is over."""
        self._phases[what] = self._phases.get(what, 0.0) + seconds

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A denoiser is called."""
        self._first = self._first or time.perf_counter()
        before = sum(self._phases.values())
        try:
            yield
        finally:
            self._last = time.perf_counter()
            self._inside += sum(self._phases.values()) - before

    def said(self, steps: int | None) -> str:
        """Where the time of the request went that ends now."""
        now = time.perf_counter()
        if not self._first:
            return f"{now - self._begun:.1f} s"
        outside = sum(self._phases.values()) - self._inside
        running = "steps" if steps is None else "1 step" if steps == 1 else f"{steps} steps"
        seconds = {
            "encoding": self._first - self._begun,
            **self._phases,
            running: self._last - self._first - self._inside,
            "decoding": now - self._last - outside,
        }
        listed = [f"{what} {took:.1f} s" for what, took in seconds.items() if took >= LEAST_S]
        return ", ".join(listed) or f"{now - self._begun:.1f} s"


class Progress:
    """The phases of one thing that is made ready; each ends where the next one begins.

    Args:
        name: of what is made ready.
        speaks: whether this rank says anything of it.
        tell: told what this rank does, for others that wait for it.
        times: where the seconds of each phase are counted.
    """

    def __init__(self, name: str, speaks: bool = False, tell: Tell | None = None, times: Times | None = None):
        self._name, self._level = name, logging.INFO if speaks else logging.DEBUG
        self._tell, self._times = tell, times
        self._what, self._total, self._done = "", 0, 0
        self._begun = self._since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since this was made."""
        return time.perf_counter() - self._begun

    def stage(self, what: str) -> None:
        """Something begins of which nobody knows how long it takes."""
        self._begin(what, Phase(f"{self._name}: {what}"))

    def begin(self, total: int) -> None:
        """So many graphs are about to be compiled."""
        if total:
            self._total, self._done = total, 0
            self._begin("compiling", self._counted())

    def step(self, count: int) -> None:
        """So many more are compiled."""
        if self._what and self._total:
            self._done += count
            if self._done < self._total:
                self._say(self._counted())

    def end(self) -> None:
        """Nothing of it goes on any more."""
        if self._what:
            self._close()
            phases.debug("%s: no phase goes on", self._name, extra={"phase": Phase("")})
            if self._tell is not None:
                self._tell("", False)

    def _counted(self) -> Phase:
        """Which graph is the next; other ranks compile others at the same time."""
        text = f"{self._name}: compiling graph {self._done + 1} of {self._total}"
        return Phase(text, self._total, self._done)

    def _begin(self, what: str, phase: Phase) -> None:
        self._close()
        self._what, self._since = what, time.perf_counter()
        self._total = phase.total or 0
        self._say(phase)

    def _close(self) -> None:
        if self._what and self._times is not None:
            self._times.add(self._what, time.perf_counter() - self._since)
        self._what = ""

    def _say(self, phase: Phase) -> None:
        phases.log(self._level, "%s", phase.text, extra={"phase": phase})
        if self._tell is not None:
            self._tell(phase.text, True)
