"""The processes of a server's ranks: started, arranged in gangs, and ended together."""

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
from collections.abc import Sequence
from multiprocessing import connection as pipes
from pathlib import Path
from typing import Any

from xdit_compile.cli.processes.ending import run_folder
from xdit_compile.cli.processes.launch import settings_of
from xdit_compile.distributed.environment import RUN_FOLDER

from .arrangements import Arrangement
from .gang import Gang
from .members import LOOK_S, GangLost, Member, answers, how_it_ended
from .messages import Hello, Ready, Regroup


class Processes:
    """All ranks.

    Args:
        command: what each runs after ``python -m xdit_compile``.
        arrangement: in which they start: one gang.
        host: where a launcher started the others, this machine's name for them; they come by themselves, and rank 0
            alone is started here. None where all are.
        start_s: they have to be ready within so many seconds.
        turn_s: a turn may take so long, compiling included.

    Attributes:
        may_restart: whether they can be had once more.
        arrangement: of the gangs that there are.
        gangs: that take turns, each by itself.
    """

    def __init__(
        self, command: list[str], arrangement: Arrangement, start_s: float, turn_s: float, host: str | None = None
    ):
        self.arrangement, self.may_restart, self._host = arrangement, host is None, host
        self.gangs: list[Gang] = []
        self._command, self._start_s, self._turn_s = command, start_s, turn_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._members: list[Member] = []
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
        ranks = self.arrangement.ranks
        with pipes.Listener(("127.0.0.1" if self._host is None else "", 0), backlog=ranks, authkey=key) as listener:
            address = self._host or "127.0.0.1", listener.address[1]
            front = json.dumps({"address": address, "key": key.hex(), "is_told": self._host is None})
            port = _free_port()
            here = range(ranks if self._host is None else 1)
            self._processes.extend(self._started(rank, folder, port, front) for rank in here)
            self._members = self._accepted(listener, limit)
        self._have_gangs(1, limit)

    def regroup(self, arrangement: Arrangement) -> None:
        """Arrange ranks that have nothing to do in other gangs, with the weights that they have.

        Raises:
            GangLost: one could not.
        """
        size = arrangement.plan.world_size
        for start in range(0, len(self._members), size):
            port = _free_port()
            for rank, member in enumerate(self._members[start : start + size]):
                member.send(Regroup(arrangement.name, rank, size, port))
        self._have_gangs(arrangement.gangs, time.monotonic() + self._start_s)
        self.arrangement = arrangement

    def end(self) -> None:
        """Have the processes end, and see that nothing of them is left."""
        with self._ending:
            for member in self._members:
                member.connection.close()
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

    def _have_gangs(self, count: int, limit: float) -> None:
        ready = answers(self._members, Ready, lambda: time.monotonic() < limit, "was not ready")
        size = len(self._members) // count
        starts = range(0, len(self._members), size)
        self.gangs = [Gang(self._members[at : at + size], ready[at : at + size], self._turn_s) for at in starts]

    def _started(self, rank: int, folder: Path, port: int, front: str) -> subprocess.Popen[bytes]:
        ranks = self.arrangement.ranks
        place: dict[str, Any] = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        } if self._host is None else {}  # fmt: skip
        place[RUN_FOLDER] = folder
        environment = {**settings_of(ranks), **os.environ, **{name: str(value) for name, value in place.items()}}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "xdit_compile", *self._command], env=environment, stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(front.encode() + b"\n")
        return process

    def _accepted(self, listener: pipes.Listener, limit: float) -> list[Member]:
        """Every rank, once it has come, in their order."""
        come: dict[int, Member] = {}
        listening = vars(vars(listener)["_listener"])["_socket"]
        listening.settimeout(LOOK_S)
        processes = dict(enumerate(self._processes))
        while len(come) < self.arrangement.ranks:
            try:
                connection = listener.accept()
                hello: Hello = connection.recv()
                come[hello.rank] = Member(hello.rank, processes.get(hello.rank), connection)
            except TimeoutError:
                _refuse_ended(self._processes)
                if time.monotonic() > limit:
                    raise GangLost(f"the ranks did not start within {self._start_s:.0f} s") from None
            except EOFError:
                time.sleep(LOOK_S)
                _refuse_ended(self._processes)
        return [come[rank] for rank in sorted(come)]


def _refuse_ended(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(processes):
        if (code := process.poll()) is not None:
            raise GangLost(f"rank {rank} {how_it_ended(code)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
