"""What a command says while it works, on stderr: warnings, phases and how long they take; and what it made, on stdout.

Libraries log and warn; who sees what is decided here. Ranks other than the first say errors alone, and which rank gives
no sign of life.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from xdit_compile.distributed.world import World

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

OURS = logging.getLogger("xdit_compile")
TIMES = logging.getLogger("xdit_compile.times")
PHASES = logging.getLogger("xdit_compile.progress")
FROM_ALL_RANKS = "xdit_compile.peers"
AT_INFO = (logging.getLogger("xdit_compile.ready"), TIMES)
"""Logs of which INFO is shown where nothing more is asked for."""
FIRST_NOTICE_S = 5.0
"""Where there is no terminal, a phase is told when it has taken so long, and again whenever that has doubled."""


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Leave logs and warnings as they were: who calls a command from Python goes on after it."""
    loggers = [OURS, PHASES, *AT_INFO, logging.getLogger(FROM_ALL_RANKS)]
    kept = [(each, each.level, each.propagate, list(each.handlers), list(each.filters)) for each in loggers]
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for each, level, propagate, handlers, filters in kept:
                each.setLevel(level)
                each.propagate, each.handlers, each.filters = propagate, handlers, filters


class Wanted(Protocol):
    """How much somebody wants to see."""

    @property
    def debug(self) -> bool: ...
    @property
    def quiet(self) -> bool: ...
    @property
    def verbose(self) -> bool: ...


def set_logs(wanted: Wanted, world: World | None = None) -> None:
    """Show what is wanted of our own log, and nothing of the libraries' but where that is all."""
    first = world is None or world.rank == 0
    level = logging.DEBUG if wanted.debug else logging.INFO if wanted.verbose else logging.WARNING
    level = level if first or wanted.debug else logging.ERROR
    OURS.setLevel(level)
    for each in AT_INFO:
        each.setLevel(logging.INFO if first and not wanted.quiet else logging.NOTSET)
    logging.getLogger(FROM_ALL_RANKS).setLevel(logging.INFO if wanted.verbose else logging.WARNING)
    if not any(isinstance(each, _AboveBars) for each in OURS.handlers):
        OURS.addHandler(_AboveBars(wanted.debug))
        OURS.propagate = False
    if not wanted.debug:
        _silence_libraries(warns=first)


def _silence_libraries(warns: bool) -> None:
    import diffusers
    import transformers

    warnings.filterwarnings("ignore")
    if warns:
        warnings.filterwarnings("default", module=r"xdit_compile(\.|$)")
        warnings.showwarning = lambda message, *rest: OURS.warning("%s", message)
    for theirs in (diffusers.utils.logging, transformers.utils.logging):
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()


class _AboveBars(logging.Handler):
    """Prints lines on stderr, above the progress bars that are open."""

    def __init__(self, names: bool):
        super().__init__()
        self._names = names
        self.setLevel(logging.DEBUG if names else logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        warning = f"xdit-compile: {record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{f'{record.name}: ' if self._names else warning}{record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def loading(what: str, wanted: Wanted, world: World) -> Iterator[None]:
    """Show that something is loaded; from then on show what goes on, and where the time of the first request went."""
    begin, shown = time.monotonic(), show_phases(wanted, world)
    shown.begin(f"loading {what}")
    try:
        yield
    finally:
        shown.over()
    TIMES.addFilter(Clock(time.monotonic() - begin, wanted.verbose))


def show_phases(wanted: Wanted, world: World) -> Phases:
    """Show what goes on from now on, where anybody wants to see it and it is this rank's to say."""
    shown = Phases(sys.stderr.isatty()) if world.rank == 0 and not wanted.quiet else Phases(None)
    PHASES.propagate = wanted.verbose or wanted.debug
    if shown.shows:
        PHASES.handlers = [shown]
        PHASES.setLevel(logging.DEBUG)
    return shown


class Clock(logging.Filter):
    """Has the line that says where the time of a request went begin with how long it took to load.

    Args:
        loaded_s: seconds.
        all_requests: whether there is a line for every request, and not for the first one alone.
    """

    def __init__(self, loaded_s: float, all_requests: bool):
        super().__init__()
        self._loaded, self._all, self._requests = loaded_s, all_requests, 0

    def filter(self, record: logging.LogRecord) -> bool:
        self._requests += 1
        if self._requests == 1:
            record.msg, record.args = f"loading {self._loaded:.1f} s, {record.getMessage()}", ()
        record.msg = f"time: {record.getMessage()}"
        return self._requests == 1 or self._all


class Phases(logging.Handler):
    """Draws the phases that are logged: as a line of the terminal, else as lines for those that take long.

    The pipeline's own bar of steps is taken off meanwhile, and counts from the end of a phase: what was needed to make
    the first step says nothing of the others.

    Args:
        terminal: whether there is one; None shows nothing.
    """

    def __init__(self, terminal: bool | None):
        super().__init__()
        self.shows, self._terminal = terminal is not None, bool(terminal)
        self._bar: Bar | None = None
        self._over: threading.Event | None = None

    def emit(self, record: logging.LogRecord) -> None:
        phase: Any = getattr(record, "phase", None)
        if phase is not None:
            self.begin(phase.text, phase.total, phase.done)

    def begin(self, text: str, total: int | None = None, done: int = 0) -> None:
        """Something goes on from now on; nothing where there is no text."""
        self.over()
        if text and self.shows:
            _take_off_bars()
            self._draw(text, total, done) if self._terminal else self._tell_later(text)

    def over(self) -> None:
        """It goes on no more."""
        if self._bar is None and self._over is None:
            return
        if self._bar is not None:
            self._bar.stop()
        if self._over is not None:
            self._over.set()
        self._bar = self._over = None
        _put_back_bars(self._terminal)

    def _draw(self, text: str, total: int | None, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.add_task(text, total=total, completed=done)
        self._bar.start()

    def _tell_later(self, text: str) -> None:
        over = self._over = threading.Event()

        def tell() -> None:
            begin = time.monotonic()
            for doubled in itertools.count():
                if over.wait(FIRST_NOTICE_S * (2**doubled) - (time.monotonic() - begin)):
                    return
                print(f"{text} ({time.monotonic() - begin:.0f} s so far)", file=sys.stderr, flush=True)

        threading.Thread(target=tell, name="phases", daemon=True).start()


def _bars() -> list[Any]:
    """The pipelines' bars that are open."""
    from tqdm import tqdm

    return [bar for bar in list(getattr(tqdm, "_instances", ())) if not bar.disable]


def _take_off_bars() -> None:
    for bar in _bars():
        bar.clear()


def _put_back_bars(terminal: bool) -> None:
    for bar in _bars():
        bar.unpause()
        if terminal:
            bar.refresh()
