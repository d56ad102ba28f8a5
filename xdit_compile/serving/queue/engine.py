"""The queue, and what runs next: decided here once, for all ranks."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

from xdit_compile.errors import XditCompileError

from .gang import Gang, GangLost
from .messages import Report, Told, Turn, Work
from .tickets import Event, Ticket

log = logging.getLogger(__name__)
STARTS = 3
"""Ranks that could not be started so often in a row are not started again."""
LOOK_S = 0.25
"""So often it is seen whether the deadline of a request in the queue has passed."""


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
    """Takes requests, and has one gang of ranks work on them.

    Everything but `Gang.start` and `Gang.exchange`, which threads wait for, happens in the event loop.

    Args:
        new_gang: makes a gang that has not started.
        limits: how much is done at once.
        model: what is served, as it was named.
        plan: the same of the plan.

    Attributes:
        facts: as `Ready` has them; empty until ranks were ready once.
        restarts: how often ranks were started anew.
        reports: of the latest turn, by rank.
        turned: called after each turn with rank 0's report.
        ended: called with each ticket that ended.
    """

    def __init__(self, new_gang: Callable[[], Gang], limits: Limits, model: str, plan: str):
        self.model, self.plan, self.limits = model, plan, limits
        self.facts: dict[str, Any] = {}
        self.restarts = 0
        self.reports: list[Report] = []
        self.turned: list[Callable[[Report], None]] = []
        self.ended: list[Callable[[Ticket], None]] = []
        self.ready = self.draining = False
        self.alive = True
        self._new_gang = new_gang
        self._gang: Gang | None = None
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
        if self._gang is not None:
            self._gang.kill()
            await asyncio.to_thread(self._gang.end)
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
            raise Full(max(1, round(len(self._queue) * self._per_request_s / self._most_at_once)))
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
        running = [
            {
                "id": id,
                "step": each.ticket.step,
                "steps": each.ticket.steps,
                "seconds": now - (each.ticket.started or now),
            }
            for id, each in self._running.items()
        ]
        ranks = [
            {"rank": each.rank, "resident": each.resident, "device_memory": each.device_memory} for each in self.reports
        ]
        return {
            "queued": len(self._queue), "running": running, "plan": self.plan, "restarts": self.restarts,
            "ranks": ranks,
        }  # fmt: skip

    @property
    def _most_at_once(self) -> int:
        return self.limits.max_batch if self.facts.get("joins") else 1

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
            self._gang = gang = self._new_gang()
            try:
                await asyncio.to_thread(gang.start)
                self.facts, self.ready, failed = gang.facts, True, 0
                log.info("the ranks are ready")
                await self._serve(gang)
            except GangLost as error:
                failed += not self.ready
                self.ready = False
                log.error("the ranks were lost: %s", error)
                self._lose(str(error))
                await asyncio.to_thread(gang.end)
                self.restarts += failed < STARTS
            except asyncio.CancelledError:
                raise
            except Exception:
                log.exception("the engine failed")
                break
        self.alive = False
        for ticket in list(self._tickets.values()):
            self._end(ticket, Event("failed", error="the ranks cannot be started; look at the server's log"))

    def _lose(self, why: str) -> None:
        """What becomes of the requests that ranks were at work on when they were lost."""
        running, self._running = list(self._running.values()), {}
        for each in running:
            ticket = each.ticket
            if each.end is not None:
                self._end(ticket, each.end)
            elif ticket.tries <= self.limits.retries:
                ticket.tell(Event("retried", error=why))
                ticket.step = 0
                self._enqueue(ticket)
            else:
                self._end(ticket, Event("failed", error=f"{why}; the request was lost with it"))

    async def _serve(self, gang: Gang) -> None:
        while True:
            if not (self._queue or self._running):
                self._wake.clear()
                await self._wake.wait()
                if self.limits.max_wait_ms and not self._running:
                    await asyncio.sleep(self.limits.max_wait_ms / 1000)
            turn = self._next_turn()
            if not (turn.start or turn.run or turn.cancel):
                continue
            reports = await asyncio.to_thread(gang.exchange, turn)
            self.reports = reports
            for tell in self.turned:
                tell(reports[0])
            for id, told in reports[0].told.items():
                self._heard(id, told)

    def _next_turn(self) -> Turn:
        cancelled = tuple(id for id, each in self._running.items() if each.end is not None)
        started = []
        while self._queue and len(self._running) < self._most_at_once:
            ticket = heapq.heappop(self._queue)[2]
            ticket.tries += 1
            ticket.started = time.monotonic()
            self._running[ticket.id] = _Running(ticket)
            ticket.tell(Event("started"))
            started.append(ticket.work)
        number = next(self._numbers)
        chosen = self._chosen()
        for id in chosen:
            self._running[id].ran = number
        return Turn(number, tuple(started), cancelled, chosen)

    def _chosen(self) -> tuple[str, ...]:
        """The request whose call has waited longest, and others whose calls may join."""
        waiting = {id: each for id, each in self._running.items() if each.key and each.end is None}
        if not waiting:
            return ()
        first = min(waiting, key=lambda id: waiting[id].ran)
        alike = [id for id, each in waiting.items() if each.key == waiting[first].key and id != first]
        return (first, *sorted(alike, key=lambda id: waiting[id].ran)[: self.limits.max_batch - 1])

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
        key: of the call that waits; empty until the ranks have said.
        ran: the number of the turn in which its latest call ran.
        end: what ends it, where it is unwanted.
    """

    ticket: Ticket
    key: str = ""
    ran: int = 0
    end: Event | None = None
