"""A replica of Ray Serve that is a gang: ranks as actors in its placement group, and what they do next."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections.abc import AsyncIterator, Collection, Mapping

import ray
from ray import serve

from xdit_compile.errors import XditCompileError
from xdit_compile.serving.logs import show_logs
from xdit_compile.serving.queue.desk import Limits, NotReady
from xdit_compile.serving.queue.engine import Engine
from xdit_compile.serving.queue.messages import Report, Turn, Work
from xdit_compile.serving.queue.processes import Processes
from xdit_compile.serving.queue.tickets import Event, Ticket
from xdit_compile.serving.request import ServeRequest

from .placing import Share
from .reports import SILENT_S, GangReport, without_pictures
from .starter import ActorStarter

log = logging.getLogger(__name__)
FRONT, GANG = "Front", "Gang"
"""Names of the deployments."""
REPORT_S = 1.0
READY_S = 0.05
SOON_S = 1.0
"""Ranks that are not ready within so long take no request: another gang may be free."""
TOGETHER_S = 0.2


class Gang:
    """Ranks of one plan, and the queue before them, which is short: the front holds the requests.

    Args:
        request_json: what the server was started with, a `ServeRequest`.
        share: what each rank takes of its machine.
        settings: for the ranks' environments.

    Raises:
        XditCompileError: the ranks cannot be started.
    """

    async def __init__(self, request_json: str, share: Share, settings: Mapping[str, str]):
        request = ServeRequest.from_json(request_json)
        show_logs(request)
        context = serve.get_replica_context()
        self._name = context.replica_tag
        self._front = serve.get_deployment_handle(FRONT, context.app_name)
        group = ray.util.get_current_placement_group()
        assert group is not None

        def processes() -> Processes:
            self._starter = ActorStarter(request, group, share, settings)
            return Processes(self._starter, request.arrangements[0], request.start_timeout)

        self._turns: list[tuple[Turn, Report]] = []
        self._slots: dict[str, str] = {}
        self._engine = _Engine(processes, _never_full(request.limits), request.name, request.arrangements)
        self._engine.turned.append(lambda turn, report: self._turns.append(without_pictures(turn, report)))
        await self._engine.start()
        await self._ready_within(math.inf)
        self.check_health()
        self._reporting = asyncio.create_task(self._report())

    def check_health(self) -> None:
        """For Serve, which has another replica in place of one that raises."""
        if not self._engine.alive:
            raise XditCompileError(f"the ranks cannot be started: {self._engine.lost}")

    def about(self) -> GangReport:
        """How this gang is."""
        engine, turns = self._engine, tuple(self._turns)
        self._turns.clear()
        return GangReport(
            self._name,
            engine.facts,
            engine.plan,
            engine.ready,
            self._starter.free,
            engine.restarts,
            dict(engine.usages),
            turns,
        )

    async def work(self, slot: str) -> AsyncIterator[list[Event]]:
        """Work on the request that the front has for a call of this, and say what becomes of it.

        ``queued`` says that it is to wait again, ``lost`` that ranks were lost with it.

        What comes soon after one another is said together: a message takes as much of a processor as some steps do.
        """
        if not await self._ready_within(SOON_S):
            return
        work: Work | None = await asyncio.wait_for(self._front.take.remote(slot, self._name), SILENT_S)
        if work is None:
            return
        try:
            ticket = self._engine.submit(work)
        except NotReady:
            yield [Event("queued")]
            return
        self._slots[slot] = ticket.id
        said: list[Event] = []
        due = time.monotonic() + TOGETHER_S
        try:
            async for event in ticket.events():
                said += [event] if event.kind not in ("queued", "started") else []
                if said and (event.ends or event.kind in ("preview", "retried") or time.monotonic() >= due):
                    yield said
                    said, due = [], time.monotonic() + TOGETHER_S
        finally:
            del self._slots[slot]
            self._engine.cancel(ticket.id)

    async def _ready_within(self, seconds: float) -> bool:
        """Whether ranks are there: at once, or after some time, which ends where there will be none."""
        limit = time.monotonic() + seconds
        while self._engine.alive and not self._engine.ready and time.monotonic() < limit:
            await asyncio.sleep(READY_S)
        return self._engine.alive and self._engine.ready

    async def _report(self) -> None:
        """Say how this gang is, again and again, and give up what nobody waits for."""
        heard = time.monotonic()
        while True:
            before = dict(self._slots)
            wanted: Collection[str] = before
            with contextlib.suppress(Exception):  # the front may be starting anew
                wanted = await asyncio.wait_for(self._front.report.remote(self.about()), SILENT_S)
                heard = time.monotonic()
            if time.monotonic() - heard >= SILENT_S:
                wanted = ()
            for slot in before.keys() - wanted:
                self._engine.cancel(before[slot])
            await asyncio.sleep(REPORT_S)

    async def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            await engine.stop(0)


class _Engine(Engine):
    """Hands requests back whose ranks were lost: the front decides what becomes of them, and where."""

    def _lose(self, ticket: Ticket, why: str) -> None:
        self._end(ticket, Event("lost", error=why))

    def _end_all(self, why: str) -> None:
        for ticket in list(self._tickets.values()):
            self._lose(ticket, why)
        super()._end_all(why)


def _never_full(limits: Limits) -> Limits:
    """The same for a queue that Serve keeps short: the front alone refuses requests."""
    return dataclasses.replace(limits, max_queue=sys.maxsize)
