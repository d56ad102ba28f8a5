"""One rank of a server: it loads the pipeline and does what the front says, turn by turn."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection
from typing import Any

import psutil
import torch

from xdit_compile.cli.options.request import PipelineRequest
from xdit_compile.cli.options.result_kind import kind_of
from xdit_compile.cli.running.pipeline_call import leave, open_parallel
from xdit_compile.distributed.world import World
from xdit_compile.errors import AgreementError, UsageError, XditCompileError, one_line
from xdit_compile.serving.queue.messages import Lost, Ready, Report, Told, Turn, Work

from .gate import GO_ON, Call, put_gates
from .joining import Joiner
from .making import Making
from .strands import Cancelled, Strand

log = logging.getLogger(__name__)
INPUT_ERRORS = (ValueError, TypeError, UsageError)
"""What pipelines raise about their arguments before their first step."""


def serve_rank(request: PipelineRequest, world: World, max_batch: int) -> None:
    """Connect to the front, whose address and key come in a line of standard input, and serve until it hangs up."""
    front = json.loads(sys.stdin.readline())
    with Client(tuple(front["address"]), authkey=bytes.fromhex(front["key"])) as connection:
        try:
            begin = time.perf_counter()
            rank = Rank(open_parallel(request, world), request, world, max_batch)
            connection.send(Ready(world.rank, os.getpid(), rank.facts(), time.perf_counter() - begin))
            rank.serve(connection)
        except (EOFError, ConnectionError):
            return
        except BaseException as error:
            connection.send(Lost(world.rank, one_line(error)))
            raise
    leave()


class Rank:
    """What this process has of a server.

    Args:
        pipe: parallelized.
        request: what the server was started with.
        world: this process's place.
        max_batch: calls that may run as one.
    """

    def __init__(self, pipe: Any, request: PipelineRequest, world: World, max_batch: int):
        self._pipe, self._request, self._world = pipe, request, world
        self._gates = put_gates(pipe)
        plan = request.plan
        self._alternates = bool(self._gates) and not plan.is_stale and plan.cfg == 1
        session = self._gates[0].session if self._gates else None
        self._whole = None if self._alternates else session
        self._joiner = Joiner(session.agreement, max_batch) if session is not None and self._alternates else None
        self._device = (session.device if session is not None else None) or torch.device("cpu")
        self._live: dict[str, tuple[Making, Strand]] = {}
        self._process = psutil.Process()
        self._seconds: dict[str, float] = {}

    def facts(self) -> dict[str, Any]:
        """As `Ready` says."""
        parameters = list(inspect.signature(type(self._pipe).__call__).parameters.values())[1:]
        named = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        return {
            "class": type(self._pipe).__name__,
            "makes": kind_of(self._pipe) or "images",
            "takes": named,
            "joins": self._joiner is not None,
            "device": str(self._device),
            "dtype": str(getattr(self._pipe, "dtype", "")).removeprefix("torch."),
        }

    def serve(self, connection: Connection) -> None:
        """Take turns until the front hangs up.

        Raises:
            XditCompileError: peers are lost.
        """
        while True:
            connection.send(self._took(connection.recv()))

    def _took(self, turn: Turn) -> Report:
        self._seconds = {}
        ids = [*turn.cancel, *(work.id for work in turn.start), *turn.run]
        with self._timed("other"):
            self._cancel(turn.cancel)
            for work in turn.start:
                self._start(work)
        self._run(turn.run)
        told = {id: self._told(id, id in turn.cancel) for id in ids}
        memory = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0
        resident = self._process.memory_info().rss
        return Report(self._world.rank, turn.number, told, len(turn.run), self._seconds, resident, memory)

    def _cancel(self, ids: tuple[str, ...]) -> None:
        for id in ids:
            if id in self._live:
                self._live[id][1].go_on(failure=Cancelled())

    def _start(self, work: Work) -> None:
        making = Making(self._pipe, work, self._request, self._whole, shows=self._world.rank == 0)
        strand = Strand(making.run, work.seed, self._device)
        self._live[work.id] = (making, strand)
        strand.go_on()

    def _run(self, ids: tuple[str, ...]) -> None:
        strands = [self._live[id][1] for id in ids if id in self._live]
        calls = [strand.asked for strand in strands]
        if not calls:
            return
        with self._timed("denoiser"):
            answers = [(GO_ON, None) for _ in calls] if self._joiner is None else self._answers(self._joiner, calls)
        with self._timed("denoiser" if self._joiner is None else "other"):
            for strand, (answer, failure) in zip(strands, answers, strict=True):
                strand.go_on(answer, failure)

    @staticmethod
    def _answers(joiner: Joiner, calls: list[Call]) -> list[tuple[Any, BaseException | None]]:
        try:
            return [(result, None) for result in joiner.run(calls)]
        except AgreementError:
            raise
        except Exception as error:  # noqa: BLE001 - each pipeline sees what its own call would have raised
            return [(None, error) for _ in calls]

    def _told(self, id: str, cancelled: bool) -> Told:
        if id not in self._live:
            return Told("cancelled")
        making, strand = self._live[id]
        preview, making.preview = making.preview, None
        if not strand.over:
            key = self._joiner.key(strand.asked) if self._joiner is not None else id
            return Told("waits", key, making.step, making.steps, preview=preview)
        del self._live[id]
        if cancelled and strand.error is not None:
            return Told("cancelled", step=making.step, steps=making.steps)
        if strand.error is not None:
            return self._failed(making, strand.error)
        pixels = strand.result
        shown = pixels.tobytes() if self._world.rank == 0 else None
        return Told("done", step=making.step, steps=making.steps, pictures=shown, shape=pixels.shape)

    def _failed(self, making: Making, error: BaseException) -> Told:
        if isinstance(error, AgreementError):
            raise error
        log.info("request %s failed", making.work.id, exc_info=error)
        is_input = isinstance(error, INPUT_ERRORS) or isinstance(error, XditCompileError) and making.step == 0
        kind = "input" if is_input and making.step == 0 else "internal"
        return Told("failed", step=making.step, steps=making.steps, error=one_line(error), kind=kind)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin
