"""What a command says while it works, on stderr: warnings, phases and how long they take; and what it made, on stdout.

Libraries log and warn; who sees what is decided here. Ranks other than the first say errors alone, and which rank gives
no sign of life.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from xdit_compile.distributed.world import World
from xdit_compile.plan.log_level import log_level

from .notices import Notices, StepLines

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

OURS = logging.getLogger("xdit_compile")
TIMES = logging.getLogger("xdit_compile.times")
PHASES = logging.getLogger("xdit_compile.progress")
FROM_ALL_RANKS = "xdit_compile.peers"
AT_INFO = (logging.getLogger("xdit_compile.ready"), TIMES)
"""Logs of which INFO is shown where nothing more is asked for."""
STEPS = "steps: {n_fmt}/{total_fmt} done, {remaining} left"
"""What is told of a bar where there is no terminal, in the words of tqdm."""


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Leave logs and warnings as they were: who calls a command from Python goes on after it."""
    loggers = [OURS, PHASES, *AT_INFO, logging.getLogger(FROM_ALL_RANKS)]
    kept = [(each, each.level, each.propagate, list(each.handlers), list(each.filters)) for each in loggers]
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for phases in filter(None, [_shown()]):
                phases.end()
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
    """Show what is wanted of our own log, and nothing of the libraries' but where that is all.

    Raises:
        UsageError: ``XDIT_COMPILE_LOG`` is no level.
    """
    show_log(wanted, world)
    if not wanted.debug:
        _silence_libraries(warns=world is None or world.rank == 0)


def show_log(
    wanted: Wanted, world: World | None = None, formatter: logging.Formatter | None = None, usual: int = logging.WARNING
) -> None:  # fmt: skip
    """Show what is wanted of our own log, in the form in which it was first shown.

    ``XDIT_COMPILE_LOG`` counts where no flag says how much.

    Args:
        formatter: of the lines; without one they are for people at a terminal.
        usual: the level where nothing says how much.

    Raises:
        UsageError: ``XDIT_COMPILE_LOG`` is no level.
    """
    first = world is None or world.rank == 0
    asked = _asked(wanted)
    level = logging.DEBUG if wanted.debug else logging.INFO if wanted.verbose else asked
    level = level or (logging.WARNING if wanted.quiet else usual)
    OURS.setLevel(level if first or level <= logging.DEBUG else max(level, logging.ERROR))
    tells = first and not wanted.quiet and (asked is None or asked <= logging.INFO)
    for each in AT_INFO:
        each.setLevel(logging.INFO if tells else logging.NOTSET)
    logging.getLogger(FROM_ALL_RANKS).setLevel(max(level, logging.INFO))
    if not any(isinstance(each, _AboveBars) for each in OURS.handlers):
        OURS.addHandler(_AboveBars(formatter or _ForPeople(names=level <= logging.DEBUG)))
        OURS.propagate = False


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

    def __init__(self, formatter: logging.Formatter):
        super().__init__()
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


class _ForPeople(logging.Formatter):
    """What was said, and by whom where ``names`` asks for that."""

    def __init__(self, names: bool):
        super().__init__()
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        warning = f"xdit-compile: {record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{f'{record.name}: ' if self._names else warning}{record.getMessage()}"


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


def show_phases(wanted: Wanted, world: World, since: float | None = None) -> Phases:
    """Show what goes on from now on, where anybody wants to see it and it is this rank's to say.

    Args:
        since: when somebody began to wait for what this process does, in seconds of the monotonic clock.
    """
    level = _asked(wanted)
    PHASES.propagate = wanted.verbose or wanted.debug or (level is not None and level <= logging.INFO)
    if (before := _shown()) is not None:
        return before
    says = world.rank == 0 and not wanted.quiet and (level is None or level <= logging.WARNING)
    shown = Phases(sys.stderr.isatty() if says else None, since)
    if shown.shows:
        PHASES.handlers = [shown]
        PHASES.setLevel(logging.DEBUG)
    return shown


@contextlib.contextmanager
def doing(text: str) -> Iterator[None]:
    """Show what a command without flags of its own for that does."""
    shown = Phases(sys.stderr.isatty())
    shown.begin(text)
    try:
        yield
    finally:
        shown.end()


def _asked(wanted: Wanted) -> int | None:
    """The level of ``XDIT_COMPILE_LOG``, where it counts."""
    return None if wanted.verbose or wanted.debug or wanted.quiet else log_level()


def _shown() -> Phases | None:
    """What shows phases already, if anything."""
    return next((each for each in PHASES.handlers if isinstance(each, Phases)), None)


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
    """Draws the phases that are logged: as a line of the terminal, else as lines where nothing was said for a while.

    The pipeline's own bar of steps is taken off meanwhile, and counts from the end of a phase: what was needed to make
    the first step says nothing of the others.

    Args:
        terminal: whether there is one; None shows nothing.
        since: when somebody began to wait, in seconds of the monotonic clock; now for None.
    """

    def __init__(self, terminal: bool | None, since: float | None = None):
        super().__init__()
        self.shows, self._terminal = terminal is not None, bool(terminal)
        self._bar: Bar | None = None
        self._notices = Notices(time.monotonic() if since is None else since) if terminal is False else None
        self._between, self._is_open = "", False

    def emit(self, record: logging.LogRecord) -> None:
        phase: Any = getattr(record, "phase", None)
        if phase is not None:
            self.begin(phase.text, phase.total, phase.done)

    def begin(self, text: str, total: int | None = None, done: int = 0) -> None:
        """Something goes on from now on; nothing where there is no text."""
        self.over()
        if not text or not self.shows:
            return
        self._is_open = True
        if self._notices is not None:
            self._notices.begin(text)
        else:
            _take_off_bars()
            self._draw(text, total, done)

    def over(self) -> None:
        """It goes on no more."""
        if not self._is_open:
            return
        self._is_open = False
        if self._notices is not None:
            self._notices.begin(self._between)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        _put_back_bars(self._terminal)

    def between(self, text: str) -> None:
        """What goes on whenever no phase does; told where there is no terminal, as a bar of steps is none."""
        self._between = text
        if self._notices is not None and not self._is_open:
            self._notices.begin(text)

    def further(self, text: str) -> None:
        """What goes on between phases is the same, and has come so far."""
        self._between = text
        if self._notices is not None and not self._is_open:
            self._notices.goes_on(text)

    def steps(self) -> dict[str, Any]:
        """What to tell a pipeline of its bar of steps."""
        if not self.shows:
            return {"disable": True}
        lines = {} if self._notices is None else {"file": StepLines(self._notices), "bar_format": STEPS}
        return {"disable": False, **lines}

    def end(self) -> None:
        """Nothing is shown any more."""
        self.over()
        if self._notices is not None:
            self._notices.end()
        PHASES.removeHandler(self)

    def _draw(self, text: str, total: int | None, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.add_task(text, total=total, completed=done)
        self._bar.start()


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
