"""One rank of a server: it loads the pipeline and does what the front says, turn by turn."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection
from typing import Any

import numpy as np
import psutil
import torch

from xdit_compile.api import parallelize, restore
from xdit_compile.cli.options.request import PipelineRequest
from xdit_compile.cli.running.pipeline_call import leave, open_parallel
from xdit_compile.distributed.seats import meet
from xdit_compile.distributed.world import World
from xdit_compile.errors import AgreementError, UsageError, XditCompileError, one_line
from xdit_compile.plan import Plan
from xdit_compile.serving.queue.messages import Hello, Lost, Ready, Regroup, Report, Told, Turn, Usage, Work

from .facts import facts_of
from .gate import GO_ON, Call, put_gates, take_off
from .joining import Joiner, Known
from .latents import Forms
from .making import Making
from .strands import Cancelled, Strand

log = logging.getLogger(__name__)
FRONT = "front"
"""The key under which ranks of a launcher find where the front is."""
INPUT_ERRORS = (ValueError, TypeError, UsageError)
"""What pipelines raise about their arguments before their first step."""


def serve_rank(
    request: PipelineRequest, world: World, max_batch: int, plans: Mapping[str, Plan], front: dict[str, Any] | None
) -> None:
    """Connect to the front and serve until it hangs up.

    Where a launcher started the ranks, rank 0 alone is told where the front is, by the front, and tells the others.

    Args:
        request: with the plan to begin with.
        world: this process's place among all.
        max_batch: calls that may run as one.
        plans: those that the front may have ranks change to, by name.
        front: its address, its key, and whether all ranks are told; None where this one is not.

    Raises:
        AgreementError: ranks did not meet in time.
    """
    store = None if front is not None and front["is_told"] else meet(world, request.plan.timeout_s)
    if store is not None:
        if front is not None:
            store.set(FRONT, json.dumps(front))
        front = json.loads(store.get(FRONT))
    assert front is not None
    _connected(front, request, world, max_batch, plans)
    del store  # until here: where rank 0 serves it, others read there
    leave()


def _connected(
    front: dict[str, Any], request: PipelineRequest, world: World, max_batch: int, plans: Mapping[str, Plan]
) -> None:
    with Client(tuple(front["address"]), authkey=bytes.fromhex(front["key"])) as connection:
        connection.send(Hello(world.rank))
        try:
            _serve(connection, request, world, max_batch, plans)
        except (EOFError, ConnectionError):
            return
        except BaseException as error:
            connection.send(Lost(world.rank, one_line(error)))
            raise


def _serve(
    connection: Connection, request: PipelineRequest, world: World, max_batch: int, plans: Mapping[str, Plan]
) -> None:
    """Serve under one plan after the other.

    What is known of joined calls is kept for each, as all ranks of a gang know the same of that.
    """
    begin, number = time.perf_counter(), world.rank
    pipe, name = open_parallel(request, world), ""
    known: dict[str, Known] = collections.defaultdict(dict)
    while True:
        rank = Rank(pipe, request, world, number, max_batch, known[name])
        connection.send(Ready(number, rank.facts(), time.perf_counter() - begin, rank.usage()))
        regroup = rank.serve(connection)
        begin, name = time.perf_counter(), regroup.arrangement
        rank.leave()
        request = dataclasses.replace(request, plan=plans[name])
        world = _arranged(regroup)
        parallelize(pipe, request.plan)


def _arranged(regroup: Regroup) -> World:
    """This process's place in a gang, written where launchers write it."""
    place = {"RANK": regroup.rank, "WORLD_SIZE": regroup.size, "MASTER_PORT": regroup.port}
    os.environ.update({name: str(value) for name, value in place.items()})
    return World.from_environment()


class Rank:
    """What this process has of a server.

    Args:
        pipe: parallelized.
        request: what the server was started with.
        world: this process's place in its gang.
        number: the same among all of the server.
        max_batch: calls that may run as one.
        known: what is known of joined calls, the same on all ranks of the gang.
    """

    def __init__(self, pipe: Any, request: PipelineRequest, world: World, number: int, max_batch: int, known: Known):
        self._pipe, self._request, self._world, self._number = pipe, request, world, number
        self._gates = put_gates(pipe)
        self._alternates = bool(self._gates) and request.plan.alternates
        session = self._gates[0].session if self._gates else None
        self._whole = None if self._alternates else session
        self._agreement = None if session is None else session.agreement
        self._forms, self._joiner = Forms(), None
        if session is not None and self._alternates:
            self._joiner = Joiner(session.agreement, max_batch, known)
        self._device = (session.device if session is not None else None) or torch.device("cpu")
        self._live: dict[str, tuple[Making, Strand]] = {}
        self._process = psutil.Process()
        self._seconds: dict[str, float] = {}

    def facts(self) -> dict[str, Any]:
        """As `Ready` says."""
        known = facts_of(self._pipe, self._request)
        return {**known, "joins": self._joiner is not None, "device": str(self._device)}

    def usage(self) -> Usage:
        """What this rank takes now."""
        memory = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else 0
        return Usage(self._process.memory_info().rss, memory, sum(gate.traffic.sent for gate in self._gates))

    def serve(self, connection: Connection) -> Regroup:
        """Take turns until this rank is to form another gang, and return how.

        Raises:
            EOFError: the front hung up.
            XditCompileError: peers are lost.
        """
        while not isinstance(message := connection.recv(), Regroup):
            connection.send(self._took(message))
        return message

    def leave(self) -> None:
        """Leave the gang: the pipeline is as it was before it was parallelized."""
        take_off(self._gates)
        restore(self._pipe)
        leave()

    def _took(self, turn: Turn) -> Report:
        self._seconds = {}
        ids = [*turn.cancel, *(work.id for work in turn.start), *turn.run]
        with self._timed("begin"):
            self._cancel(turn.cancel)
            for work in turn.start:
                self._start(work)
        self._run(turn.run)
        told = {id: self._told(id, id in turn.cancel) for id in ids}
        return Report(self._number, told, self._seconds, self.usage())

    def _cancel(self, ids: tuple[str, ...]) -> None:
        for id in ids:
            if id in self._live:
                self._live[id][1].go_on(failure=Cancelled())

    def _start(self, work: Work) -> None:
        shows = self._world.rank == 0
        making = Making(self._pipe, work, self._request, self._whole, shows, self._forms, self._agreement)
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
        for strand, (answer, failure) in zip(strands, answers, strict=True):
            begin = time.perf_counter()
            strand.go_on(answer, failure)
            phase = "denoiser" if self._joiner is None else "decode" if strand.over else "between"
            self._spent(phase, time.perf_counter() - begin)

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
        return self._done(making, strand.result)

    def _done(self, making: Making, made: np.ndarray | bytes) -> Told:
        done = Told("done", step=making.step, steps=making.steps)
        if isinstance(made, bytes):
            return dataclasses.replace(done, latents=made if self._world.rank == 0 else None)
        shown = made.tobytes() if self._world.rank == 0 else None
        return dataclasses.replace(done, pictures=shown, shape=made.shape)

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
        self._spent(phase, time.perf_counter() - begin)

    def _spent(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
