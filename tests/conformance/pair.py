"""Two processes of one gloo group that live as long as they answer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from conformance.verdicts import Answer, Verdict, joined
from conformance.worker import serve

RANKS = range(2)
START_S = 120.0
GRACE_S = 15.0
"""How much longer the second rank may take once the first has answered with something else than a result."""
CELLS = 60
"""Cells until a pair is replaced, healthy or not."""
PRELOADED = ["torch", "torch.distributed", "diffusers", "transformers", "xdit_compile.api", "conformance.worker"]
_FINE = (Verdict.EXACT, Verdict.WRONG)


class Pair:
    """Started when it is first asked, and again after a failure.

    Args:
        limit: seconds for one cell.
        timeout_s: seconds that a rank waits for the other.
        serve: what a rank runs, as `worker.serve` does.
    """

    def __init__(self, limit: float, timeout_s: float, serve: Callable[..., None] = serve):
        self._limit, self._timeout_s, self._serve = limit, timeout_s, serve
        self._processes: list[Any] = []
        self._ends: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._cells = 0

    def ask(self, case: str, plan: str) -> Answer:
        """The answer of both ranks. One that does not come within the limit is a crash, and ends the pair."""
        if not self._processes or self._cells >= CELLS:
            self.close()
            self._start()
        for end in self._ends:
            end.send((case, plan))
        self._cells += 1
        answers = self._answers(self._limit)
        if not _clean(answers):
            self.close()
        return joined(answers)

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for end in self._ends:
            end.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._ends, self._folder, self._cells = [], [], None, 0

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="conformance-")
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        for rank in RANKS:
            here, there = context.Pipe()
            process = context.Process(
                target=self._serve, args=(rank, self._folder.name, there, self._timeout_s), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._ends.append(here)
        for end in self._ends:
            if not end.poll(START_S) or end.recv() != "ready":
                raise RuntimeError(f"a worker did not start within {START_S} s")

    def _answers(self, limit: float) -> list[Answer]:
        """By rank; what did not come says why."""
        found: dict[int, Answer] = {}
        deadline = time.monotonic() + limit
        while len(found) < len(RANKS) and time.monotonic() < deadline:
            waiting = [self._ends[rank] for rank in RANKS if rank not in found]
            for end in wait(waiting, timeout=max(deadline - time.monotonic(), 0)):
                rank = self._ends.index(end)
                found[rank] = self._received(rank)
                if found[rank].verdict not in _FINE:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        first = next(iter(found.values()), None)
        late = f"hang: no answer within {limit:.0f} s"
        if first is not None and first.verdict not in _FINE:
            late = f"hang: no answer within {GRACE_S:.0f} s of the other rank's: {first.reason}"
        return [found.get(rank) or Answer(Verdict.CRASHED, late, seconds=limit) for rank in RANKS]

    def _received(self, rank: int) -> Answer:
        with contextlib.suppress(EOFError, ConnectionError):
            return self._ends[rank].recv()
        self._processes[rank].join(1)
        assert self._folder is not None
        log = Path(self._folder.name, f"{rank}.log")
        said = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
        return Answer(Verdict.CRASHED, f"ended with exit code {self._processes[rank].exitcode}: {''.join(said)}")


def _clean(answers: list[Answer]) -> bool:
    """Whether nothing of a cell can be left in the processes."""
    kinds = {answer.verdict for answer in answers}
    return len(kinds) == 1 and not next(iter(kinds)).fault
