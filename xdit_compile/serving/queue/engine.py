"""The queue, and what runs next: decided here once, for all ranks."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence

from xdit_compile.errors import XditCompileError, one_line

from .arrangements import Arrangement
from .desk import LOOK_S, Desk, Limits
from .gang import Gang
from .members import GangLost
from .messages import Report, Told, Turn
from .processes import Processes
from .tickets import Event, Ticket

log = logging.getLogger(__name__)
STARTS = 3
"""Ranks that could not be started so often in a row are not started again, nor arranged anew."""
SETTLED_S = 0.5
"""Ranks that were without work for so long are arranged for a single request."""


class Engine(Desk):
    """Takes requests, and has gangs of ranks work on them.

    Everything but `Processes` and `Gang.exchange`, which threads wait for, happens in the event loop.

    Where there are two arrangements, an idle server has the first, in which one request at a time has all ranks. It
    takes the second when several wait and nothing is at work, and the first again when it was idle for a moment.

    Args:
        new_processes: makes ranks that have not started, arranged as the first of ``arrangements``.
        limits: how much is done at once.
        model: what is served, as it was named.
        arrangements: one, or that for a single request and that for a queue.

    Attributes:
        lost: why ranks were lost last.
    """

    def __init__(
        self, new_processes: Callable[[], Processes], limits: Limits, model: str, arrangements: Sequence[Arrangement]
    ):
        super().__init__(limits, model)
        self.lost = ""
        self._new_processes = new_processes
        self._processes: Processes | None = None
        self._arrangements, self._arrangement = arrangements, arrangements[0]
        self._gangs: list[Gang] = []
        self._leaving = False
        self._failed_shifts = 0
        self._worked = time.monotonic()
        self._numbers = itertools.count(1)
        self._running: dict[str, _Running] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to start the ranks; does not wait for them."""
        self._tasks = [asyncio.create_task(self._drive()), asyncio.create_task(self._watch_deadlines())]

    async def stop(self, drain_s: float) -> None:
        """Take no more requests, give those that are here so many seconds, and end the ranks."""
        await self.drain(drain_s)
        for task in self._tasks:
            task.cancel()
        self._end_all("the server ended")
        if self._processes is not None:
            self._processes.kill()
            await asyncio.to_thread(self._processes.end)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def plan(self) -> str:
        """How the ranks are arranged, in words."""
        return self._arrangement.words

    @property
    def _is_for_one(self) -> bool:
        """Whether there is another arrangement, for requests that come while there is one."""
        return self._arrangement is not self._arrangements[-1]

    @property
    def _most_at_once(self) -> int:
        return self._most_of_gang * max(1, len(self._gangs))

    @property
    def _most_of_gang(self) -> int:
        """Requests that a gang works on."""
        return self.limits.max_batch if self.facts.get("joins") and not self._is_for_one else 1

    def _came(self) -> None:
        self._wake.set()

    def _stop(self, ticket: Ticket, event: Event) -> None:
        each = self._running[ticket.id]
        each.end = each.end or event
        self._wake.set()

    async def _drive(self) -> None:
        """Have ranks, and begin anew with others where they are lost."""
        failed = 0
        while failed < STARTS:
            self._arrangement = self._arrangements[0]
            self._processes = processes = self._new_processes()
            try:
                await asyncio.to_thread(processes.start)
                self._have(processes.gangs)
                failed = 0
                log.info("the ranks are ready")
                await self._serve(processes)
            except GangLost as error:
                failed += not self.ready
                self.ready, self.lost = False, str(error)
                log.error("the ranks were lost: %s", error)
                self._lose_gangs(self._gangs, str(error))
                await asyncio.to_thread(processes.end)
                if not processes.may_restart:
                    break
                self.restarts += failed < STARTS
            except Exception as error:
                self.ready, self.lost = False, one_line(error)
                if isinstance(error, XditCompileError):
                    log.error("the ranks cannot be started: %s", error)
                else:
                    log.exception("the engine failed")
                await asyncio.to_thread(processes.end)
                break
        self.alive = False
        self._end_all("the ranks cannot be started; look at the server's log")

    def _lose_gangs(self, gangs: Sequence[Gang], why: str) -> None:
        """What becomes of the requests that ranks were at work on when they were lost."""
        for id in [id for id, each in self._running.items() if each.gang in gangs]:
            each = self._running.pop(id)
            if each.end is not None:
                self._end(each.ticket, each.end)
            else:
                self._lose(each.ticket, why)

    def _have(self, gangs: list[Gang]) -> None:
        self._gangs, self._leaving, self._worked = gangs, False, time.monotonic()
        for gang in gangs:
            self.usages.update(gang.usages)
        self.facts, self.ready = gangs[0].facts, True

    async def _serve(self, processes: Processes) -> None:
        """Have all gangs work, until the ranks are to be arranged anew, and arrange them."""
        while True:
            await self._all_work()
            arrangement = next(each for each in self._arrangements if each is not self._arrangement)
            self._failed_shifts, begin = self._failed_shifts + 1, time.monotonic()
            await asyncio.to_thread(processes.regroup, arrangement)
            self._failed_shifts, self.shifts = 0, self.shifts + 1
            self._arrangement = arrangement
            log.info("the ranks were arranged in %.1f s: %s", time.monotonic() - begin, arrangement.words)
            self._have(processes.gangs)

    async def _all_work(self) -> None:
        """Return when all gangs have; where one is lost, once the others have done what they are at.

        Raises:
            GangLost: one was.
        """
        tasks = [asyncio.create_task(self._work(gang)) for gang in self._gangs]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            self._leaving = True
            self._wake.set()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome
        finally:
            for task in tasks:
                task.cancel()

    async def _work(self, gang: Gang) -> None:
        """Take turns until the ranks are to be arranged anew, or others of them were lost."""
        while True:
            if self._shifts():
                self._leaving = True
                self._wake.set()
            turn = self._next_turn(gang)
            if turn.start or turn.run or turn.cancel:
                try:
                    reports = await asyncio.to_thread(gang.exchange, turn)
                except GangLost as error:
                    self._lose_gangs([gang], str(error))
                    raise
                self._heard_all(turn, reports)
            elif self._leaving:
                return
            else:
                await self._wait(gang)

    async def _wait(self, gang: Gang) -> None:
        """Until there may be something to do; a rank that is lost meanwhile is noticed."""
        self._wake.clear()
        try:
            await asyncio.wait_for(self._wake.wait(), LOOK_S)
        except TimeoutError:
            await asyncio.to_thread(gang.look)
            return
        if self.limits.max_wait_ms and not self._running:
            await asyncio.sleep(self.limits.max_wait_ms / 1000)

    def _shifts(self) -> bool:
        """Whether the ranks are to be arranged anew now."""
        if len(self._arrangements) == 1 or self._running or self._failed_shifts >= STARTS:
            return False
        if self._is_for_one:
            return len(self._queue) > 1
        return not self._queue and time.monotonic() - self._worked > SETTLED_S

    def _next_turn(self, gang: Gang) -> Turn:
        mine = {id: each for id, each in self._running.items() if each.gang is gang}
        cancelled = tuple(id for id, each in mine.items() if each.end is not None)
        started = []
        while self._queue and not self._leaving and self._has_room(gang):
            ticket = self._next()
            self._running[ticket.id] = _Running(ticket, gang)
            started.append(ticket.work)
        if started and self._queue:
            self._wake.set()
        number = next(self._numbers)
        chosen = self._chosen(mine)
        for id in chosen:
            mine[id].ran = number
        return Turn(tuple(started), cancelled, chosen)

    def _has_room(self, gang: Gang) -> bool:
        """Whether a gang takes one more request; those of others that have fewer come first."""
        counts = [sum(each.gang is other for each in self._running.values()) for other in self._gangs]
        mine = counts[self._gangs.index(gang)]
        return mine < self._most_of_gang and mine == min(counts)

    def _chosen(self, running: dict[str, _Running]) -> tuple[str, ...]:
        """The request whose call has waited longest, and others whose calls may join."""
        waiting = {id: each for id, each in running.items() if each.key and each.end is None}
        if not waiting:
            return ()
        first = min(waiting, key=lambda id: waiting[id].ran)
        alike = [id for id, each in waiting.items() if each.key == waiting[first].key and id != first]
        return (first, *sorted(alike, key=lambda id: waiting[id].ran)[: self.limits.max_batch - 1])

    def _heard_all(self, turn: Turn, reports: list[Report]) -> None:
        self._worked = time.monotonic()
        self.usages.update({report.rank: report.usage for report in reports})
        for tell in self.turned:
            tell(turn, reports[0])
        for id, told in reports[0].told.items():
            self._heard(id, told)

    def _heard(self, id: str, told: Told) -> None:
        each = self._running.get(id)
        if each is None:
            return
        ticket = each.ticket
        if told.step > ticket.step:
            ticket.tell(Event("step", told.step, told.steps))
        if told.state == "waits":
            each.key = told.key
            if told.preview is not None:
                ticket.tell(Event("preview", told.step, told.steps, *told.preview))
            return
        del self._running[id]
        if each.end is not None:
            self._end(ticket, each.end)
        elif told.state == "done":
            self._end(ticket, Event("done", told.step, told.steps, told.pictures, told.shape, told.latents))
        elif told.state == "failed":
            self._end(ticket, Event("failed", told.step, error=told.error, is_input=told.kind == "input"))
        else:
            self._end(ticket, Event("cancelled", told.step))


@dataclasses.dataclass(eq=False)
class _Running:
    """A request that ranks are at work on.

    Args:
        ticket: of it.
        gang: of these ranks.
        key: of the call that waits; empty until the ranks have said.
        ran: the number of the turn in which its latest call ran.
        end: what ends it, where it is unwanted.
    """

    ticket: Ticket
    gang: Gang
    key: str = ""
    ran: int = 0
    end: Event | None = None
