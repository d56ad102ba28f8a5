"""The ranks that work on the same requests: started, talked to, and ended together."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection as pipes
from pathlib import Path
from typing import Any

from xdit_compile.cli.processes.ending import run_folder
from xdit_compile.cli.processes.launch import settings_of
from xdit_compile.distributed.environment import RUN_FOLDER
from xdit_compile.errors import XditCompileError

from .messages import Lost, Ready, Report, Turn

LOOK_S = 0.2
"""So often it is seen whether a process has ended, beside its connection, which tells at once as a rule."""


class GangLost(XditCompileError):
    """A rank died, failed alone, or does not answer; all of them have to be started anew."""


class Gang:
    """Processes of one plan.

    Args:
        command: what each runs after ``python -m xdit_compile``.
        ranks: how many there are.
        start_s: they have to be ready within so many seconds.
        turn_s: a turn may take so long, compiling included.

    Attributes:
        facts: what rank 0 said of the pipeline once it was ready.
    """

    def __init__(self, command: list[str], ranks: int, start_s: float, turn_s: float):
        self.facts: dict[str, Any] = {}
        self._command, self._ranks, self._start_s, self._turn_s = command, ranks, start_s, turn_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[pipes.Connection] = []
        self._held = contextlib.ExitStack()
        self._ending = threading.Lock()

    def start(self) -> None:
        """Start the processes and wait until all have loaded the pipeline.

        Raises:
            GangLost: one ended before, or was not ready in time.
        """
        limit = time.monotonic() + self._start_s
        folder = self._held.enter_context(run_folder())
        key = secrets.token_bytes(32)
        with pipes.Listener(("127.0.0.1", 0), backlog=self._ranks, authkey=key) as listener:
            front = json.dumps({"address": listener.address, "key": key.hex()})
            port = _free_port()
            for rank in range(self._ranks):
                self._processes.append(self._started(rank, folder, port, front))
            self._connections = self._accepted(listener, limit)
        ready = self._answers(Ready, lambda: time.monotonic() < limit, "was not ready")
        self.facts = next(each.facts for each in ready if each.rank == 0)

    def exchange(self, turn: Turn) -> list[Report]:
        """Have all ranks take a turn; their reports in the order of ranks.

        Raises:
            GangLost: one died or failed, they differ, or a turn takes too long.
        """
        for rank, each in enumerate(self._connections):
            try:
                each.send(turn)
            except OSError as error:
                raise GangLost(self._said_of(rank, str(error))) from error
        limit = time.monotonic() + self._turn_s
        reports = sorted(
            self._answers(Report, lambda: time.monotonic() < limit, "did not end its turn"), key=lambda each: each.rank
        )
        self._compare(reports)
        return reports

    def end(self) -> None:
        """Have the processes end, and see that nothing of them is left."""
        with self._ending:
            for each in self._connections:
                each.close()
            limit = time.monotonic() + 3
            while time.monotonic() < limit and any(process.poll() is None for process in self._processes):
                time.sleep(0.02)
            self.kill()
            for process in self._processes:
                process.wait()
            self._held.close()

    def kill(self) -> None:
        """End the processes at once, whatever they do."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()

    def _started(self, rank: int, folder: Path, port: int, front: str) -> subprocess.Popen[bytes]:
        place = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._ranks, "LOCAL_WORLD_SIZE": self._ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, RUN_FOLDER: folder,
        }  # fmt: skip
        environment = {**settings_of(self._ranks), **os.environ, **{name: str(value) for name, value in place.items()}}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "xdit_compile", *self._command], env=environment, stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(front.encode() + b"\n")
        return process

    def _accepted(self, listener: pipes.Listener, limit: float) -> list[pipes.Connection]:
        """A connection of every rank, in the order in which they come."""
        come: list[pipes.Connection] = []
        listening = vars(vars(listener)["_listener"])["_socket"]
        listening.settimeout(LOOK_S)
        while len(come) < self._ranks:
            try:
                come.append(listener.accept())
            except TimeoutError:
                self._refuse_ended()
                if time.monotonic() > limit:
                    raise GangLost(f"the ranks did not start within {self._start_s:.0f} s") from None
        return come

    def _answers(self, kind: type, in_time: Callable[[], bool], late: str) -> list[Any]:
        """One message of a kind from every rank."""
        waited_for: list[Any] = list(self._connections)
        answers = []
        while waited_for:
            for each in pipes.wait(waited_for, LOOK_S):
                answers.append(self._received(each, kind))
                waited_for.remove(each)
            if waited_for and not in_time():
                raise GangLost(f"a rank {late} in time")
            if waited_for:
                self._refuse_ended()
        return answers

    def _received(self, connection: Any, kind: type) -> Any:
        try:
            message = connection.recv()
        except (EOFError, OSError) as error:
            time.sleep(LOOK_S)
            self._refuse_ended()
            raise GangLost("a rank hung up") from error
        if isinstance(message, Lost):
            raise GangLost(f"rank {message.rank}: {message.error}")
        if not isinstance(message, kind):
            raise GangLost(f"a rank said something else: {type(message).__name__}")
        return message

    def _refuse_ended(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                raise GangLost(self._said_of(rank, "it hung up"))

    def _said_of(self, rank: int, otherwise: str) -> str:
        code = self._processes[rank].poll()
        if code is None:
            return f"rank {rank}: {otherwise}"
        return f"rank {rank} " + (f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}")

    def _compare(self, reports: list[Report]) -> None:
        first = {id: told.compared for id, told in reports[0].told.items()}
        for report in reports[1:]:
            other = {id: told.compared for id, told in report.told.items()}
            if other != first:
                differing = next(id for id in {**first, **other} if first.get(id) != other.get(id))
                words = report.told[differing].error or reports[0].told[differing].error or "it went another way"
                raise GangLost(f"ranks {reports[0].rank} and {report.rank} differ over a request: {words}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
