"""Starting the processes of one command on this machine through PyTorch's elastic launcher."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_compile.distributed.environment import RUN_FOLDER, defaults
from xdit_compile.errors import XditCompileError

from .ending import Interrupted, end_run, kill, processes_of, run_folder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
ENDED_BY = {
    signal.SIGKILL: "see that there is memory enough, and start again",
    signal.SIGABRT: "NCCL's watchdog does that where a transfer between ranks failed, or took longer than the plan's "
    "timeout_s, and so does a library that finds itself broken; look at what the first rank that failed printed, and "
    "start again, with --debug to see more",
    signal.SIGSEGV: "a library crashed; start again with --debug, and look at what it printed",
    signal.SIGBUS: "see that there is room in shared memory (/dev/shm; --shm-size of a container) and on the disk that "
    "the weights are read from, and start again",
}
"""What to do about a process that a signal ended."""
END_SECONDS = 5
"""Ranks are given so long to end after one failed, or the command was interrupted, before they are killed."""


class WorkerFailed(XditCompileError):
    """A process that this command started has failed; carries the exit code that process would have given."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch(
    arguments: list[str], nproc: int, debug: bool = False, begin: Callable[[], None] = lambda: None
) -> None:  # fmt: skip
    """Run ``python -m xdit_compile ARGUMENTS`` in ``nproc`` processes and wait for all of them.

    The first process to fail ends the others. Each process gets its share of the cores unless OMP_NUM_THREADS is set.
    Whatever they have started, and their temporary files, are gone when this returns or raises. Signals are left to
    who called this: the launcher would listen to them until it ends, and leave its processes where a second one comes.

    Args:
        begin: called when the processes are about to start, which speak themselves.

    Raises:
        WorkerFailed: naming the rank that failed first and what it said.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debug:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    since_torch_2_12 = {"shutdown_timeout": END_SECONDS}
    fields = {each.name for each in dataclasses.fields(LaunchConfig)}
    limits: dict[str, Any] = {name: value for name, value in since_torch_2_12.items() if name in fields}
    with run_folder() as folder, defaults(settings_of(nproc, debug) | {RUN_FOLDER: str(folder)}):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=f"xdit-compile-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
            signals_to_handle="SIGQUIT",
            **limits,
        )
        try:
            begin()
            with _killing_the_rest(folder):
                elastic_launch(config, sys.executable)("-P", "-m", "xdit_compile", *arguments)
        except ChildFailedError as error:
            raise _worker_failed(error) from None
        except SignalException as error:
            raise Interrupted(error.sigval) from None


@contextmanager
def _killing_the_rest(folder: Path) -> Iterator[None]:
    """Kill processes that do not end soon after one failed: the launcher asks them to, which one that stopped ignores,
    and waits for half a minute."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if _has_failed():
                if not over.wait(END_SECONDS):
                    kill(processes_of(folder), signal.SIGKILL)
                return

    threading.Thread(target=watch, name="kill-the-rest", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _has_failed() -> bool:
    """Wait for a process that this one started to end, and leave it to whoever asks for it; whether it failed."""
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return False
    return ended is not None and ended.si_status != 0


def report_failure(error: BaseException, exit_code: int, message: str) -> None:
    """Leave a failure where the launcher that started this process looks for it."""
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    now = time.time()
    extra = {
        "py_callstack": traceback.format_exc(),
        "timestamp": str(int(now)),
        "time": now,
        "text": message,
        "exit_code": exit_code,
        "on_purpose": isinstance(error, XditCompileError),
    }
    with open(path, "w") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def end_with_parent(interval_s: float = 1.0) -> None:
    """End this process soon after the one that started it is gone, whatever the main thread waits for.

    One of them then does what that one did at its end.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(interval_s)
        if (folder := os.environ.get(RUN_FOLDER)) and os.environ.get("LOCAL_RANK") == "0":
            end_run(Path(folder))
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def stop_with_input(patience_s: float = 1.0) -> None:
    """Have this process end as at a SIGTERM once its standard input ends, and as at a second one then.

    That is a pipe of whoever started it, and ends with that, also where another program takes its place.
    """

    def stop() -> None:
        while os.read(0, 4096):
            pass
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(patience_s)

    threading.Thread(target=stop, name="stop-with-input", daemon=True).start()


def settings_of(nproc: int, debug: bool = False) -> dict[str, str]:
    """What each of several processes of one machine finds in its environment, where nothing else is set there."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"OMP_NUM_THREADS": str(max(1, cores // nproc))}
    if not debug:
        wanted |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    return wanted


def _worker_failed(error: ChildFailedError) -> WorkerFailed:
    first = min(failure.timestamp for failure in error.failures.values())
    rank, failure = min(error.failures.items(), key=lambda item: _blame(item[1], first))
    extra = _extra(failure)
    if extra:
        return WorkerFailed(f"rank {rank}: {extra['text']}", int(extra["exit_code"]))
    if failure.exitcode < 0:
        return WorkerFailed(f"rank {rank} {killed_by(-failure.exitcode)}", 1)
    return WorkerFailed(f"rank {rank} ended with exit code {failure.exitcode}; start again with --debug", 1)


def killed_by(number: int) -> str:
    """What to say of a process that a signal ended, and what to do about it."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    advice = next((text for one, text in ENDED_BY.items() if one == number), "something outside ended it; start again")
    return f"was killed by {name}; {advice}"


def _blame(failure: ProcessFailure, first: int) -> tuple[int, float]:
    """Order failures by how likely each is the cause.

    A rank that dies without a word makes its peers fail later; a watchdog ends those that wait for one that failed.
    Those that do not end then are killed: such a rank was stopped, or hangs, and what was said of it counts.

    Args:
        first: when the first one failed, in whole seconds.
    """
    extra = _extra(failure)
    if extra:
        return (1 if extra["on_purpose"] else 2, extra["time"])
    if failure.exitcode == -signal.SIGKILL and failure.timestamp >= first + END_SECONDS - 1:
        return (5, 0.0)
    ended = {-signal.SIGABRT: 3, -signal.SIGTERM: 4, 128 + signal.SIGTERM: 4}
    return (ended.get(failure.exitcode, 0), 0.0)


def _extra(failure: ProcessFailure) -> dict[str, Any]:
    message: Any = failure.message
    return message["extraInfo"] if isinstance(message, dict) else {}
