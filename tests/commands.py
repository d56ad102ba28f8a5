"""The real command in processes of its own, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TINY_PIPELINE = Path(__file__).parent / "data" / "tiny_pipeline"
"""A whole pipeline of real classes with random weights: quick, and its pictures are noise."""

COMMAND = [sys.executable, "-P", "-m", "xdit_compile"]


def run(*arguments: str, cwd: Path, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command, away from the repository."""
    environment = {**clean_environment(), **environment}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def clean_environment() -> dict[str, str]:
    """This process's environment without what a launcher sets."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launcher}


def one_error(done: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """The one line on stderr, progress aside."""
    assert done.returncode == exit_code, done.stderr
    lines = [line for line in whole_lines(done) if not line.endswith(" s so far)")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("xdit-compile: error: ")
    return lines[0].removeprefix("xdit-compile: error: ")


def whole_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines on stderr, which was no terminal: none is empty, and nothing in them moves a cursor."""
    lines = done.stderr.split("\n")
    assert lines.pop() == "" and all(line.strip() and line.isprintable() for line in lines), repr(done.stderr)
    return lines


def files(folder: Path) -> set[str]:
    """Everything in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}
