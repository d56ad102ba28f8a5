"""Two long-lived gloo processes that are told what to do again and again; one that dies is replaced with its peer."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import ahead
import procs
import torch
import torch.distributed as dist

RANKS = 2
DIED = "died"


class Pair:
    """Runs functions on two processes at once, each with one thread.

    Args:
        limit_s: how long one function may take on any of them.
        host: rank 0 keeps the store of the process group, in place of a file.
        backend: of the process group; of this folder is `pretend`.
    """

    def __init__(self, limit_s: float = 90, host: bool = False, backend: str = "gloo"):
        self.limit, self._host, self._backend = limit_s, host, backend
        self._folder: tempfile.TemporaryDirectory | None = None
        self._members: list[tuple[Any, Connection]] = []

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``fn(rank, memory, *args)`` returns on each; `DIED` of one that ended.

        ``memory`` is a dict that lasts as long as the processes, which begin anew after one ended.

        Raises:
            AssertionError: one raised, or did not come to an end in time.
        """
        if not self._members:
            self._start()
        for _, pipe in self._members:
            pipe.send((fn, args))
        found = [self._result(process, pipe) for process, pipe in self._members]
        if DIED in found:
            self.end()
        wrong = [f"rank {rank}: {value[1]}" for rank, value in enumerate(found) if value[0] == "raised"]
        if wrong:
            self.end()
            raise AssertionError("\n".join(wrong))
        return [value if value == DIED else value[1] for value in found]

    def end(self) -> None:
        """End both processes."""
        for _, pipe in self._members:
            pipe.close()
        for process, _ in self._members:
            process.join(timeout=5)
            process.kill()
            process.join()
        self._members.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pair-")
        store = f"tcp://127.0.0.1:{_free_port()}" if self._host else f"file://{self._folder.name}/rendezvous"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(procs.PRELOADED)
        with procs._one_thread():
            for rank in range(RANKS):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(rank, store, self._backend, there), daemon=True)
                process.start()
                there.close()
                self._members.append((process, here))

    def _result(self, process: Any, pipe: Connection) -> Any:
        try:
            if pipe.poll(self.limit):
                return pipe.recv()
        except EOFError:
            return DIED
        return "raised", f"did not come to an end within {self.limit} s"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, store: str, backend: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    if backend == ahead.NAME:
        ahead.register()
    dist.init_process_group(backend, store, rank=rank, world_size=RANKS, timeout=limit)
    memory: dict[Any, Any] = {}
    with contextlib.suppress(EOFError):
        while True:
            fn, args = pipe.recv()
            try:
                answer = ("returned", fn(rank, memory, *args))
            except BaseException:  # noqa: BLE001 - whatever it was, the parent reports it
                answer = ("raised", traceback.format_exc())
            pipe.send(answer)


def kill_itself() -> None:
    """End this process at once, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_for(seconds: float) -> None:
    """Have this process do nothing for a while, its threads neither."""
    import subprocess

    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
