"""How the ranks of a server come to be: as processes of this machine, beside those that a launcher started."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from typing import Any, Protocol

from xdit_compile.cli.processes.ending import run_folder
from xdit_compile.cli.processes.launch import killed_by, settings_of
from xdit_compile.distributed.environment import RUN_FOLDER


class Child(Protocol):
    """Where a rank runs that was started from here."""

    def ended(self) -> str | None:
        """How it ended, in words that follow "rank 1"; None while it runs."""

    def kill(self) -> None:
        """End it at once, whatever it does."""

    def wait(self) -> None:
        """Return once it is gone; it was told to go."""


class Starter(Protocol):
    """Starts ranks, once.

    Attributes:
        host: this machine's name for ranks on others; None where there are none.
        may_restart: whether ranks can be had once more, from another one of the kind.
    """

    host: str | None
    may_restart: bool

    def start(self, ranks: int, front: dict[str, Any]) -> list[Child]:
        """Start what is to be started from here, the first ranks of all.

        Args:
            ranks: how many there are.
            front: what a rank is told to find the front, for `serve_rank`.
        """

    def close(self) -> None:
        """Remove what was needed meanwhile; the ranks are gone."""


class ProcessStarter:
    """Starts processes on this machine: all, or rank 0 alone where a launcher started the others.

    Args:
        command: what each runs after ``python -m xdit_compile``.
        host: this machine's name for ranks that a launcher started, which come by themselves; else None.
    """

    def __init__(self, command: list[str], host: str | None = None):
        self.host, self.may_restart = host, host is None
        self._command = command
        self._held = contextlib.ExitStack()

    def start(self, ranks: int, front: dict[str, Any]) -> list[Child]:
        """As `Starter.start`."""
        folder = self._held.enter_context(run_folder())
        said = json.dumps({**front, "is_told": self.host is None})
        port = free_port()
        places = [
            {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            } for rank in range(ranks)
        ] if self.host is None else [{}]  # fmt: skip
        common = {**settings_of(ranks), **os.environ, RUN_FOLDER: str(folder)}
        return [self._started({**common, **{name: str(value) for name, value in place.items()}}, said)
                for place in places]  # fmt: skip

    def close(self) -> None:
        """As `Starter.close`."""
        self._held.close()

    def _started(self, environment: dict[str, str], said: str) -> Process:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "xdit_compile", *self._command], env=environment, stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(said.encode() + b"\n")
        return Process(process)


class Process:
    """A rank as a process of this machine."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process

    def ended(self) -> str | None:
        """As `Child.ended`."""
        code = self._process.poll()
        return None if code is None else how_it_ended(code)

    def kill(self) -> None:
        """As `Child.kill`."""
        if self._process.poll() is None:
            self._process.kill()

    def wait(self) -> None:
        """As `Child.wait`."""
        self._process.wait()


def how_it_ended(code: int) -> str:
    """What to say of a process that ended by itself."""
    return killed_by(-code) if code < 0 else f"ended with exit code {code}"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing has now at an address of this machine; empty for all of them."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
