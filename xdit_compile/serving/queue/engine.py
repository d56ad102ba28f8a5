"""The queue, and what runs next: decided here once, for all ranks."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from xdit_compile.errors import XditCompileError

from .arrangements import Arrangement
from .gang import Gang
from .members import GangLost
from .messages import Report, Told, Turn, Usage, Work
from .processes import Processes
from .tickets import Event, Ticket

log = logging.getLogger(__name__)
STARTS = 3
"""Ranks that could not be started so often in a row are not started again, nor arranged anew."""
LOOK_S = 0.25
"""So often it is seen whether the deadline of a request in the queue has passed, and whether idle ranks are there."""
SETTLED_S = 0.5
"""Ranks that were without work for so long are arranged for a single request."""


class Full(XditCompileError):
    """The queue is full.

    Args:
        retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class NotReady(XditCompileError):
    """The server takes no requests: it ends, or its ranks cannot be started."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much is done at once.

    Args:
        max_batch: calls of the denoiser that run as one, and requests that are at work at the same time.
        max_wait_ms: an idle server waits so long for others before it begins a request.
        max_queue: requests that wait.
        retries: how often a request begins again after its ranks were lost.
    """

    max_batch: int = 8
    max_wait_ms: float = 0.0
    max_queue: int = 64
    retries: int = 0


class Engine:
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
        facts: as `Ready` has them; empty until ranks were ready once.
        restarts: how often ranks were started anew.
        shifts: how often they were arranged anew.
        usages: of the ranks after their latest turn, by rank.
        turned: called after each turn with it and the report of its first rank.
        ended: called with each ticket that ended.
    """

    def __init__(
        self, new_processes: Callable[[], Processes], limits: Limits, model: str, arrangements: Sequence[Arrangement]
    ):
        self.model, self.limits = model, limits
        self.facts: dict[str, Any] = {}
        self.restarts = self.shifts = 0
        self.usages: dict[int, Usage] = {}
        self.turned: list[Callable[[Turn, Report], None]] = []
        self.ended: list[Callable[[Ticket], None]] = []
        self.ready = self.draining = False
        self.alive = True
        self._new_processes = new_processes
        self._processes: Processes | None = None
        self._arrangements, self._arrangement = arrangements, arrangements[0]
        self._gangs: list[Gang] = []
        self._leaving = False
        self._failed_shifts = 0
        self._worked = time.monotonic()
        self._queue: list[tuple[int, int, Ticket]] = []
        self._order = itertools.count()
        self._numbers = itertools.count(1)
        self._running: dict[str, _Running] = {}
        self._tickets: dict[str, Ticket] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._per_request_s = 1.0

    async def start(self) -> None:
        """Begin to start the ranks; does not wait for them."""
        self._tasks = [asyncio.create_task(self._drive()), asyncio.create_task(self._watch_deadlines())]

    async def stop(self, drain_s: float) -> None:
        """Take no more requests, give those that are here so many seconds, and end the ranks."""
        self.draining = True
        limit = time.monotonic() + drain_s
        while self._tickets and self.alive and time.monotonic() < limit:
            await asyncio.sleep(0.02)
        for task in self._tasks:
            task.cancel()
        for ticket in list(self._tickets.values()):
            self._end(ticket, Event("failed", error="the server ended"))
        if self._processes is not None:
            self._processes.kill()
            await asyncio.to_thread(self._processes.end)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def submit(self, work: Work, priority: int = 0, deadline_s: float | None = None) -> Ticket:
        """Put a request into the queue.

        Raises:
            Full: it is full.
            NotReady: no requests are taken.
        """
        if self.draining or not self.alive:
            raise NotReady("the server is about to end" if self.draining else "the ranks cannot be started")
        if len(self._queue) >= self.limits.max_queue:
            at_once = self._most_at_once * max(1, len(self._gangs))
            raise Full(max(1, round(len(self._queue) * self._per_request_s / at_once)))
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        ticket = Ticket(work, priority, deadline)
        self._tickets[ticket.id] = ticket
        ticket.tell(Event("queued"))
        self._enqueue(ticket)
        return ticket

    def cancel(self, id: str) -> bool:
        """Give a request up: at once in the queue, and before its next call where it is at work."""
        ticket = self._tickets.get(id)
        if ticket is None:
            return False
        self._give_up(ticket, Event("cancelled"))
        return True

    def status(self) -> dict[str, Any]:
        """What goes on, for whoever asks."""
        now = time.monotonic()
        tickets = [each.ticket for each in self._running.values()]
        running = [
            {"id": each.id, "step": each.step, "steps": each.steps, "seconds": now - (each.started or now)}
            for each in tickets
        ]
        ranks = [{"rank": rank, **dataclasses.asdict(usage)} for rank, usage in sorted(self.usages.items())]
        return {
            "queued": len(self._queue), "running": running, "plan": self.plan, "restarts": self.restarts,
            "shifts": self.shifts, "ranks": ranks,
        }  # fmt: skip

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
        """Requests that a gang works on."""
        return self.limits.max_batch if self.facts.get("joins") and not self._is_for_one else 1

    def _enqueue(self, ticket: Ticket) -> None:
        heapq.heappush(self._queue, (-ticket.priority, next(self._order), ticket))
        self._wake.set()

    def _give_up(self, ticket: Ticket, event: Event) -> None:
        if ticket.id in self._running:
            self._running[ticket.id].end = event
            self._wake.set()
        else:
            self._queue = [entry for entry in self._queue if entry[2] is not ticket]
            heapq.heapify(self._queue)
            self._end(ticket, event)

    def _end(self, ticket: Ticket, event: Event) -> None:
        self._tickets.pop(ticket.id, None)
        ticket.tell(event)
        if ticket.started is not None and ticket.ended is not None and event.kind == "done":
            self._per_request_s += 0.2 * (ticket.ended - ticket.started - self._per_request_s)
        for tell in self.ended:
            tell(ticket)

    async def _watch_deadlines(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for ticket in list(self._tickets.values()):
                at_work = self._running.get(ticket.id)
                if ticket.deadline is not None and now > ticket.deadline and not (at_work and at_work.end):
                    self._give_up(ticket, Event("late", error="its deadline passed"))

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
                self.ready = False
                log.error("the ranks were lost: %s", error)
                self._lose(self._gangs, str(error))
                await asyncio.to_thread(processes.end)
                if not processes.may_restart:
                    break
                self.restarts += failed < STARTS
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("the engine failed")
                break
        self.alive = False
        for ticket in list(self._tickets.values()):
            self._end(ticket, Event("failed", error="the ranks cannot be started; look at the server's log"))

    def _lose(self, gangs: Sequence[Gang], why: str) -> None:
        """What becomes of the requests that ranks were at work on when they were lost."""
        for id in [id for id, each in self._running.items() if each.gang in gangs]:
            each = self._running.pop(id)
            ticket = each.ticket
            if each.end is not None:
                self._end(ticket, each.end)
            elif ticket.tries <= self.limits.retries:
                ticket.tell(Event("retried", error=why))
                ticket.step = 0
                self._enqueue(ticket)
            else:
                self._end(ticket, Event("failed", error=f"{why}; the request was lost with it"))

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
                    self._lose([gang], str(error))
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
            ticket = heapq.heappop(self._queue)[2]
            ticket.tries += 1
            ticket.started = time.monotonic()
            self._running[ticket.id] = _Running(ticket, gang)
            ticket.tell(Event("started"))
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
        return mine < self._most_at_once and mine == min(counts)

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
            self._end(ticket, Event("done", told.step, told.steps, told.pictures, told.shape))
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
