"""A command ends at a signal, and where a rank stops: real processes, real signals, and nothing that is left behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from commands import COMMAND, TINY_PIPELINE, clean_environment, files, one_error, run, whole_lines

from xdit_compile.cli.processes import notices
from xdit_compile.cli.processes.ending import processes_of

LIMIT_S = 180
EAGER = ["--model", str(TINY_PIPELINE), "--backend", "eager", "--num_inference_steps", "900"]
COMPILED = ["--model", str(TINY_PIPELINE), "--no_cache", "--num_inference_steps", "900"]
TWO = ["--nproc", "2", "--ulysses_degree", "2"]


def _listening() -> None:
    """Of a shell's background processes SIGINT is ignored, and of what they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Command:
    """A command that runs in folders of its own: where it is started, and for temporary files."""

    def __init__(self, folder: Path, *flags: str):
        self.here, self.temporary = folder / "here", folder / "temporary"
        self.here.mkdir()
        self.temporary.mkdir()
        self._log = folder / "log"
        environment = {**clean_environment(), "TMPDIR": str(self.temporary)}
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "generate", *flags], cwd=self.here, env=environment, stdout=log, stderr=log,
                preexec_fn=_listening,
            )  # fmt: skip

    @property
    def log(self) -> str:
        return self._log.read_text().replace("\r", "\n")

    def until(self, holds: Callable[[], bool]) -> None:
        limit = time.monotonic() + LIMIT_S
        while not holds():
            assert self.process.poll() is None and time.monotonic() < limit, self.log
            time.sleep(0.05)

    def workers(self) -> dict[int, psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {int(each.environ()["RANK"]): each for each in children if "worker" in each.cmdline()}

    def left(self) -> set[str]:
        """Whatever lies among temporary files."""
        return files(self.temporary)

    def running(self) -> list[int]:
        return [number for folder in self.temporary.glob("xdit-compile-*") for number in processes_of(folder)]

    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("xdit-compile: error: ")]


STARTING = "nothing"
LOADING = "the workers"
COMPILING = "a compiler"
STEPS = "steps"


def is_at(command: Command, stage: str) -> bool:
    if stage == STARTING:
        return True
    if stage == STEPS:
        return re.search(r" [1-9]\d*/900 ", command.log) is not None
    children = psutil.Process(command.process.pid).children(recursive=True)
    if stage == LOADING:
        return any("worker" in each.cmdline() for each in children if each.is_running())
    return any(each.name().startswith(("cc1plus", "g++", "c++")) for each in children)


@pytest.mark.parametrize(
    ("flags", "stage", "number", "times"),
    [
        pytest.param([*TWO, *EAGER], LOADING, signal.SIGINT, 2, id="two-loading"),
        pytest.param([*TWO, *EAGER], STARTING, signal.SIGTERM, 1, id="two-starting", marks=pytest.mark.slow),
        pytest.param([*TWO, *EAGER], STEPS, signal.SIGTERM, 2, id="two-steps", marks=pytest.mark.slow),
        pytest.param([*TWO, *COMPILED], COMPILING, signal.SIGINT, 1, id="two-compiling", marks=pytest.mark.slow),
        pytest.param([*TWO, *COMPILED], COMPILING, signal.SIGTERM, 2, id="two-compiling-twice", marks=pytest.mark.slow),
        pytest.param(COMPILED, COMPILING, signal.SIGTERM, 1, id="one-compiling", marks=pytest.mark.slow),
        pytest.param(EAGER, STEPS, signal.SIGINT, 2, id="one-steps", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_with_one_line(
    tmp_path: Path, flags: list[str], stage: str, number: signal.Signals, times: int
):
    command = Command(tmp_path, *flags)
    if stage == STARTING:
        time.sleep(1.5)
    command.until(lambda: is_at(command, stage))
    children = psutil.Process(command.process.pid).children(recursive=True)
    for _ in range(times):
        command.process.send_signal(number)
        time.sleep(0.1)
    assert command.process.wait(timeout=60) == 128 + number
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert command.errors() == [f"xdit-compile: error: {word}"]
    assert "Traceback" not in command.log and "death signal" not in command.log
    assert files(command.here) == set() and command.left() == set()
    psutil.wait_procs(children, timeout=5)
    assert not [each for each in children if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [STEPS, LOADING])
def test_a_stopped_rank_is_named_once_and_ends_all(tmp_path: Path, stage: str):
    command = Command(tmp_path, *TWO, *EAGER, "--timeout", "40")
    command.until(lambda: is_at(command, stage) and 1 in command.workers())
    command.workers()[1].suspend()
    begin = time.monotonic()
    command.until(lambda: "rank 1" in command.log)
    assert time.monotonic() - begin > 25
    assert command.process.wait(timeout=60) == 1
    warnings = [line for line in command.log.splitlines() if "warning: rank 1" in line]
    assert len(warnings) == 1
    (error,) = command.errors()
    assert "rank 1 stopped: it gives no sign of life" in error or "rank 1 is not here" in error
    assert command.left() == set()


@pytest.mark.slow
def test_a_rank_that_goes_on_in_time_is_no_failure(tmp_path: Path):
    command = Command(tmp_path, *TWO, *EAGER[:-1], "300", "--timeout", "60", "--output", "out.png")
    command.until(lambda: re.search(r" [1-9]\d*/300 ", command.log) is not None)
    worker = command.workers()[1]
    worker.suspend()
    command.until(lambda: "warning: rank 1 gives no sign of life" in command.log)
    worker.resume()
    assert command.process.wait(timeout=LIMIT_S) == 0, command.log
    assert files(command.here) == {"out.png"} and command.left() == set()


def disturbed(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """What came of Python code that runs the command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=folder, env=clean_environment(), capture_output=True, text=True
    )


def test_a_signal_while_an_error_is_told_changes_nothing(tmp_path: Path):
    code = (
        "import os, signal, sys; from xdit_compile.cli import main as command\n"
        "told = command._told\n"
        "def disturbed(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return told(*arguments)\n"
        "command._told = disturbed\n"
        "sys.argv = ['xdit-compile', 'generate', '--nproc', '0']\n"
        "command.entry()\n"
    )
    done = disturbed(tmp_path, code)
    assert "--nproc 0 must be at least 1" in one_error(done, 2)


def test_a_signal_counts_though_what_it_raised_was_caught(tmp_path: Path):
    code = (
        "import contextlib, os, signal, sys; from xdit_compile.cli import main as command\n"
        "def disturbed(*arguments, **settings):\n"
        "    with contextlib.suppress(BaseException):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "command.cli.main = disturbed\n"
        "sys.argv = ['xdit-compile', 'doctor']\n"
        "command.entry()\n"
    )
    done = disturbed(tmp_path, code)
    assert one_error(done, 143) == "terminated"


AT_ONCE = (
    "import sys; from xdit_compile.cli.processes import notices; notices.SILENCE_S = 0.2\n"
    "from xdit_compile.cli.main import entry; sys.argv = ['xdit-compile', *sys.argv[1:]]; entry()"
)
"""The command, which tells what goes on after a silence of 0.2 s already."""


def told(folder: Path, *arguments: str) -> str:
    """What a command says on stderr where that is no terminal; nothing may be left among temporary files."""
    environment = {**clean_environment(), "TMPDIR": str(folder / "temporary")}
    (folder / "temporary").mkdir()
    command = [sys.executable, "-P", "-c", AT_ONCE, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert files(folder / "temporary") == set()
    return "\n".join(whole_lines(done))


def test_what_goes_on_is_told_again_and_at_once_after_a_pause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(notices, "SILENCE_S", 0.1)
    told = notices.Notices(time.monotonic())
    told.begin("loading")
    time.sleep(0.45)
    told.begin("")
    loading = capsys.readouterr().err.splitlines()
    assert len(loading) >= 3 and set(loading) == {"loading (under 1 s so far)"}
    time.sleep(0.2)
    told.begin("compiling")
    time.sleep(0.05)
    told.end()
    assert capsys.readouterr().err == "compiling (under 1 s so far)\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "phases"),
    [
        ("explain", ["--no_cache"], ["starting", "building the model", "transformer: capturing"]),
        ("tune", ["--backend", "eager", "--rounds", "3", "--cache_dir", "kept"], ["starting", "tune: capturing"]),
        ("build", ["--cache_dir", "kept"], ["starting", "transformer: compiling graph"]),
    ],
)
def test_commands_say_what_goes_on_in_whole_lines(tmp_path: Path, command: str, flags: list[str], phases: list[str]):
    said = told(tmp_path, command, "--model", str(TINY_PIPELINE), *flags)
    assert all(re.search(rf"^{phase}.* s so far\)$", said, re.MULTILINE) for phase in phases), said


@pytest.mark.slow
def test_ranks_say_what_goes_on_in_whole_lines(tmp_path: Path):
    flags = ["--model", str(TINY_PIPELINE), "--backend", "eager", "--num_inference_steps", "60", *TWO]
    said = told(tmp_path, "generate", *flags)
    assert re.search(r"^starting 2 processes .*s so far\)$", said, re.MULTILINE)
    assert "transformer ready in" in said and "time: loading" in said, said


@pytest.mark.slow
def test_the_level_of_the_log_is_taken_from_the_environment(tmp_path: Path):
    flags = ["--model", str(TINY_PIPELINE), "--backend", "eager", "--no_cache", "--num_inference_steps", "8"]
    flags += ["--prompt", "red"]
    lines = {}
    for level, more in (("error", ["--num_frames", "3", "--fps", "4"]), ("info", []), ("debug", ["--quiet"])):
        done = run("generate", *flags, *more, "--overwrite", cwd=tmp_path, XDIT_COMPILE_LOG=level)
        assert done.returncode == 0, done.stderr
        lines[level] = done.stderr
    assert lines["error"] == "" and "transformer: capturing" in lines["info"] and lines["debug"] == ""


def test_a_level_that_is_none_is_refused(tmp_path: Path):
    said = one_error(run("generate", cwd=tmp_path, XDIT_COMPILE_LOG="loud"), 2)
    assert said == "XDIT_COMPILE_LOG=loud is no level; give one of debug, info, warning, error, critical"


@pytest.mark.parametrize(("level", "said"), [("info", "xdit_compile: INFO: a fact"), ("warning", "")])
def test_programs_have_the_level_of_the_environment_once_they_begin(level: str, said: str):
    code = (
        "import logging, xdit_compile; from xdit_compile.plan.log_level import set_log_level\n"
        "log = logging.getLogger('xdit_compile'); assert not log.handlers and log.level == logging.NOTSET\n"
        "set_log_level(); log.info('a fact')"
    )
    environment = {**clean_environment(), "XDIT_COMPILE_LOG": level}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == said
