"""Requests from their arrival to their end: who waits, in which order and until when, whoever works on them."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable
from typing import Any

from xdit_compile.errors import XditCompileError

from .messages import Report, Turn, Usage, Work
from .tickets import Event, Ticket

LOOK_S = 0.25
"""So often it is seen whether the deadline of a request has passed, and whether idle ranks are there."""


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


class Desk(abc.ABC):
    """Takes requests and says what became of them; a subclass has them worked on. All happens in one event loop.

    Args:
        limits: how much is done at once.
        model: what is served, as it was named.

    Attributes:
        facts: as `Ready` has them; empty until ranks were ready once.
        restarts: how often ranks were started anew.
        shifts: how often they were arranged anew.
        usages: of the ranks after their latest turn, by rank.
        turned: called after each turn with it and the report of its first rank.
        ended: called with each ticket that ended.
        ready: whether ranks are there.
        draining: whether no more requests are taken.
        alive: whether ranks can be had.
    """

    def __init__(self, limits: Limits, model: str):
        self.model, self.limits = model, limits
        self.facts: dict[str, Any] = {}
        self.restarts = self.shifts = 0
        self.usages: dict[int | str, Usage] = {}
        self.turned: list[Callable[[Turn, Report], None]] = []
        self.ended: list[Callable[[Ticket], None]] = []
        self.ready = self.draining = False
        self.alive = True
        self._queue: list[tuple[int, int, Ticket]] = []
        self._order = itertools.count()
        self._tickets: dict[str, Ticket] = {}
        self._per_request_s = 1.0

    @property
    @abc.abstractmethod
    def plan(self) -> str:
        """How the ranks are arranged, in words."""

    @property
    @abc.abstractmethod
    def _most_at_once(self) -> int:
        """Requests that are at work at the same time at most."""

    @abc.abstractmethod
    def _came(self) -> None:
        """A request waits."""

    @abc.abstractmethod
    def _stop(self, ticket: Ticket, event: Event) -> None:
        """Have a request that is at work end so."""

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
            {"id": each.id, "step": each.step, "steps": each.steps, "seconds": now - each.started}
            for each in self._tickets.values()
            if each.started is not None
        ]
        ranks = [{"rank": rank, **dataclasses.asdict(usage)} for rank, usage in sorted(self.usages.items())]
        return {
            "queued": len(self._queue), "running": running, "plan": self.plan, "restarts": self.restarts,
            "shifts": self.shifts, "ranks": ranks,
        }  # fmt: skip

    async def drain(self, limit_s: float) -> None:
        """Take no more requests, and give those that are here so many seconds."""
        self.draining = True
        limit = time.monotonic() + limit_s
        while self._tickets and self.alive and time.monotonic() < limit:
            await asyncio.sleep(0.02)

    def _next(self) -> Ticket:
        """The request that begins now: of the highest priority, and of these the one that came first."""
        ticket = heapq.heappop(self._queue)[2]
        ticket.tries += 1
        ticket.started = time.monotonic()
        ticket.tell(Event("started"))
        return ticket

    def _lose(self, ticket: Ticket, why: str) -> None:
        """What becomes of a request whose ranks were lost."""
        if ticket.tries <= self.limits.retries:
            ticket.tell(Event("retried", error=why))
            self._wait_again(ticket)
        else:
            self._end(ticket, Event("failed", error=f"{why}; the request was lost with it"))

    def _wait_again(self, ticket: Ticket) -> None:
        ticket.step, ticket.started = 0, None
        self._enqueue(ticket)

    def _end(self, ticket: Ticket, event: Event) -> None:
        self._tickets.pop(ticket.id, None)
        ticket.tell(event)
        if ticket.started is not None and ticket.ended is not None and event.kind == "done":
            self._per_request_s += 0.2 * (ticket.ended - ticket.started - self._per_request_s)
        for tell in self.ended:
            tell(ticket)

    def _end_all(self, why: str) -> None:
        self._queue.clear()
        for ticket in list(self._tickets.values()):
            self._end(ticket, Event("failed", error=why))

    def _enqueue(self, ticket: Ticket) -> None:
        heapq.heappush(self._queue, (-ticket.priority, next(self._order), ticket))
        self._came()

    def _give_up(self, ticket: Ticket, event: Event) -> None:
        if ticket.started is not None:
            self._stop(ticket, event)
        else:
            self._queue = [entry for entry in self._queue if entry[2] is not ticket]
            heapq.heapify(self._queue)
            self._end(ticket, event)

    async def _watch_deadlines(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for ticket in list(self._tickets.values()):
                if ticket.deadline is not None and now > ticket.deadline:
                    ticket.deadline = None
                    self._give_up(ticket, Event("late", error="its deadline passed"))
