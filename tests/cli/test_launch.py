"""What the launcher says of processes that ended, without starting any."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from xdit_compile.cli.processes.launch import ERROR_FILE, _worker_failed, report_failure
from xdit_compile.errors import AgreementError


def said(*failures: ProcessFailure) -> str:
    return str(_worker_failed(ChildFailedError("worker", dict(enumerate(failures)))))


def ended(exitcode: int, file: str = "none") -> ProcessFailure:
    return ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file=file)


@pytest.mark.parametrize(
    ("number", "words", "other"),
    [
        (signal.SIGKILL, "memory enough", "watchdog"),
        (signal.SIGABRT, "watchdog", "memory"),
        (signal.SIGABRT, "timeout_s", "memory"),
        (signal.SIGABRT, "the first rank that failed", "memory"),
        (signal.SIGSEGV, "crashed", "memory"),
        (signal.SIGBUS, "/dev/shm", "memory enough"),
        (signal.SIGINT, "outside", "memory"),
    ],
)
def test_each_signal_is_explained(number: signal.Signals, words: str, other: str) -> None:
    message = said(ended(-number))
    assert message.startswith(f"rank 0 was killed by {number.name}; ")
    assert words in message and other not in message and "\n" not in message


def test_signals_without_a_name_and_plain_exit_codes_are_told() -> None:
    assert said(ended(-35)).startswith("rank 0 was killed by signal 35; ")
    assert said(ended(7)).startswith("rank 0 ended with exit code 7; ")


def test_the_cause_is_told_before_what_follows_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that ends the ranks that wait for one that failed is none, nor is the launcher's own signal."""
    files: dict[type, Any] = {MemoryError: tmp_path / "memory", AgreementError: tmp_path / "peer"}
    for kind, file in files.items():
        monkeypatch.setenv(ERROR_FILE, str(file))
        report_failure(kind(), 1, f"says {kind.__name__}")
    memory, peer = (ended(1, str(file)) for file in files.values())
    aborted, killed, terminated = (ended(-each) for each in (signal.SIGABRT, signal.SIGKILL, signal.SIGTERM))
    assert said(aborted, memory, terminated) == "rank 1: says MemoryError"
    assert said(terminated, aborted).startswith("rank 1 was killed by SIGABRT")
    assert said(aborted, peer, killed).startswith("rank 2 was killed by SIGKILL")
