"""Ends a command at a signal: one line, the exit code that shells know, and nothing of it left behind."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from xdit_compile.cache.seal import private_folder
from xdit_compile.distributed.environment import RUN_FOLDER
from xdit_compile.errors import UsageError

ENDING = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "ended as its terminal was closed"}
"""Signals that end a command, and what it says then."""
IMPATIENT_S = 10.0
"""A signal so long after the first one ends the process at once: what was to be cleaned up does not get done."""
INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
"""Where inductor keeps files for later processes, and Triton with it; what the user has set stays."""
INDUCTOR_FILES = "inductor-files"
"""The folder of these in the cache folder: torch's headers as they were compiled, and what the processor can do."""
GRACE_S = 1.0
"""Processes are given so long to end by themselves before they are killed."""


class Interrupted(BaseException):
    """A signal came that ends the command.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell says of a command that the signal ended."""
        return 128 + self.number

    def __str__(self) -> str:
        return ENDING.get(signal.Signals(self.number), f"ended by {signal.Signals(self.number).name}")


class Signals:
    """Has the first signal that comes raise `Interrupted` in the main thread, and those that follow wait for its end.

    Processes that this one started are asked to end before: Python kills a compiler that it waits for as soon as
    anything is raised there, and what is killed leaves its files.

    Attributes:
        came: what was raised, which something may have taken for a failure of its own.
    """

    def __init__(self) -> None:
        self.came: Interrupted | None = None
        self._first: float | None = None
        self._is_over = False

    def listen(self) -> None:
        """From now on; for the main thread alone. A signal that is ignored, as under nohup, stays so."""
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._come)

    def over(self) -> None:
        """What was asked for is over, one way or another: signals wait while it is said how, and raise nothing."""
        self._is_over = True

    def end(self, exit_code: int) -> None:
        """Let nothing disturb the process in its last moments, in which Python listens no more.

        These are short: nobody waits for the memory of graphs to be given back piece by piece, which takes seconds, nor
        for transfers with a process that has stopped. All that was asked for is written by now.
        """
        for number in () if exit_code else ENDING:
            signal.signal(number, signal.SIG_IGN)
        if self.came is not None:
            _end(lambda: descendants(os.getpid()))
        atexit._run_exitfuncs()
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # who read it is gone, or the disk is full
            exit_code = exit_code or 1
        os._exit(exit_code)

    def _come(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
            if not self._is_over:
                self.came = Interrupted(number)
                _ask_to_end(lambda: descendants(os.getpid()), signal.SIGTERM)
                raise self.came
        elif time.monotonic() - self._first > IMPATIENT_S:
            os._exit(128 + number)


@contextmanager
def compilers_apart(cache: Path | None) -> Iterator[None]:
    """Have compilers that are called meanwhile leave nothing among temporary files, whatever becomes of them.

    Theirs are in a folder that is gone afterwards: that of the run, where this process is one of several of a command.
    What inductor keeps for later processes is in the cache folder, or in that folder where nothing is kept. After a
    signal it stays so: other threads may call compilers until the process has ended.

    Args:
        cache: the folder of compiled programs; None where nothing is kept.
    """
    of_run, before = os.environ.get(RUN_FOLDER), {name: os.environ.get(name) for name in ("TMPDIR", INDUCTOR)}
    folder = of_run or tempfile.mkdtemp(prefix="xdit-compile-")
    tempfile.gettempdir()
    os.environ["TMPDIR"] = folder
    if not before[INDUCTOR]:
        os.environ[INDUCTOR] = str(_inductor_files(cache) or Path(folder) / "inductor")
    is_ending = False
    try:
        yield
    except Interrupted:
        is_ending = True
        _end(lambda: descendants(os.getpid()))
        raise
    finally:
        for name, value in () if is_ending else before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        if not of_run:
            shutil.rmtree(folder, ignore_errors=True)


def _inductor_files(cache: Path | None) -> Path | None:
    """Where inductor keeps files for later processes, where only this user can write there."""
    if cache is None:
        return None
    try:
        return private_folder(private_folder(cache) / INDUCTOR_FILES)
    except (UsageError, OSError):
        return None


@contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for what the processes of a command write meanwhile; they, theirs, and the folder are gone afterwards.

    Whatever they start is known by the folder's name, which it has in its environment.
    """
    folder = Path(tempfile.mkdtemp(prefix="xdit-compile-"))
    try:
        yield folder
    finally:
        end_run(folder)


def end_run(folder: Path) -> None:
    """End all processes of a run but this one, and remove its folder."""
    _end(lambda: processes_of(folder))
    shutil.rmtree(folder, ignore_errors=True)


def _end(processes: Callable[[], list[int]]) -> None:
    """End processes: a compiler removes its files where it is asked to end, and not where it is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _ask_to_end(processes, number)


def _ask_to_end(processes: Callable[[], list[int]], number: int) -> None:
    """Send processes a signal, and give them the time to end."""
    limit = time.monotonic() + GRACE_S
    kill(processes(), number)
    while processes() and time.monotonic() < limit:
        time.sleep(0.02)


def kill(processes: Iterable[int], number: int) -> None:
    """Send a signal to processes, of which some may be gone."""
    for process in processes:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def descendants(ancestor: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    parents: dict[int, int] = {}
    for number in _numbers():
        with suppress(OSError):
            state, parent, *_ = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                parents[number] = int(parent)
    family = [ancestor]
    for each in family:
        family += [number for number, parent in parents.items() if parent == each]
    return family[1:]


def processes_of(folder: Path) -> list[int]:
    """The processes of this user that have the folder of a run in their environment, this one aside."""
    mark = os.fsencode(f"{RUN_FOLDER}={folder}")
    return [number for number in _numbers() if mark in _environment(number)]


def _numbers() -> list[int]:
    """All processes of this machine that can be seen, this one aside; none where there is no ``/proc``."""
    return [int(each.name) for each in Path("/proc").glob("[0-9]*") if each.name != str(os.getpid())]


def _environment(number: int) -> list[bytes]:
    """The environment that a process was started with; nothing of one that is gone, or of somebody else's."""
    try:
        return Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
