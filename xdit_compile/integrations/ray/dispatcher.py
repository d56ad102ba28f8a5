"""The queue of a service whose gangs come and go: each takes the next request when it has room for one.

For every request that waits there is one open call of a gang, a slot. Serve gives slots to gangs that have room, and
counts them to decide how many gangs there are. Which request a slot is for is decided when a gang asks, so that
priorities hold whatever Serve does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

from xdit_compile.serving.queue.desk import LOOK_S, Desk, Limits
from xdit_compile.serving.queue.messages import Usage, Work
from xdit_compile.serving.queue.tickets import Event, Ticket
from xdit_compile.serving.room import Free

from .reports import SILENT_S, GangReport

log = logging.getLogger(__name__)
AGAIN_S = 0.5
"""After a slot was lost before anything came of it, so long passes before the next."""
Open = Callable[[str], AbstractAsyncContextManager[AsyncIterator[list[Event]]]]
"""Opens a slot; what comes of it are the events of one request. Closing it gives the request up."""


class Dispatcher(Desk):
    """Takes requests, and has gangs work on them.

    Args:
        open_slot: of a gang with room, whichever that is.
        limits: how much is done at once.
        model: what is served, as it was named.
        patience_s: requests wait so long for a gang where there is none.
    """

    def __init__(self, open_slot: Open, limits: Limits, model: str, patience_s: float):
        super().__init__(limits, model)
        self._open_slot, self._patience_s = open_slot, patience_s
        self._gangs: dict[str, _Gang] = {}
        self._seen = time.monotonic()
        self._restarts_before: dict[str, int] = {}
        self._slots: dict[str, _Slot] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look after requests."""
        self._tasks = [asyncio.create_task(self._watch_deadlines()), asyncio.create_task(self._watch_gangs())]

    async def stop(self, drain_s: float) -> None:
        """Take no more requests, and give those that are here so many seconds."""
        await self.drain(drain_s)
        tasks = [*self._tasks, *(slot.task for slot in self._slots.values())]
        self._fail_all("the server ended")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def take(self, slot: str, gang: str) -> Work | None:
        """The request that a slot is for; None where none waits any more.

        Args:
            gang: that asks.
        """
        if slot not in self._slots:
            return None
        self._slots[slot].gang = gang
        if not self._queue:
            return None
        ticket = self._slots[slot].ticket = self._next()
        return ticket.work

    def report(self, said: GangReport) -> tuple[str, ...]:
        """Know how a gang is; the slots that are open."""
        before = self._gangs.get(said.name)
        if before is None:
            log.info("gang %s is there", said.name)
        self._restarts_before.pop(said.name, None)
        self._gangs[said.name] = _Gang(dataclasses.replace(said, turns=()), time.monotonic())
        self._seen, self.alive = time.monotonic(), True
        self.facts = said.facts or self.facts
        for turn, report in said.turns:
            for tell in self.turned:
                tell(turn, report)
        self._count()
        return tuple(self._slots)

    def status(self) -> dict[str, object]:
        """As `Desk.status`, and ``gangs``: how many there are."""
        return {**super().status(), "gangs": len(self._gangs)}

    @property
    def free(self) -> Free | None:
        """What a rank of any gang had at least before it loaded anything; None where nobody says."""
        known = [gang.said.free for gang in self._gangs.values() if gang.said.free.bytes is not None]
        return min(known, key=lambda free: free.bytes or 0, default=None)

    @property
    def plan(self) -> str:
        """How the ranks of a gang are arranged, in words, and how many gangs there are."""
        words = next((gang.said.plan for gang in self._gangs.values()), "no gang")
        return f"{words} x {len(self._gangs)}" if len(self._gangs) > 1 else words

    @property
    def _most_at_once(self) -> int:
        return max(1, len(self._gangs)) * (self.limits.max_batch if self.facts.get("joins") else 1)

    def _came(self) -> None:
        self._have_slots()

    def _stop(self, ticket: Ticket, event: Event) -> None:
        slot = next(slot for slot in self._slots.values() if slot.ticket is ticket)
        slot.ticket = None
        slot.task.cancel()
        self._end(ticket, event)

    def _fail_all(self, why: str) -> None:
        for slot in self._slots.values():
            slot.ticket = None
        self._end_all(why)

    def _have_slots(self) -> None:
        """One for each request that waits."""
        unused = sum(not slot.gang for slot in self._slots.values())
        for _ in range(len(self._queue) - unused):
            name = secrets.token_hex(8)
            self._slots[name] = _Slot(asyncio.create_task(self._attend(name)))

    async def _attend(self, name: str) -> None:
        """Hear what becomes of a slot."""
        why = "its gang went away"
        try:
            async with self._open_slot(name) as events:
                async for said in events:
                    for event in said:
                        self._heard(self._slots[name], event)
        except asyncio.CancelledError:
            self._close(name, why)
            raise
        except Exception as error:  # noqa: BLE001 - whatever Ray says of a replica that is gone
            why = f"a gang was lost ({type(error).__name__})"
            log.info("a slot was lost", exc_info=error)
        try:
            if self._queue and not self._slots[name].gang:
                await asyncio.sleep(AGAIN_S)
        finally:
            self._close(name, why)

    def _heard(self, slot: _Slot, event: Event) -> None:
        ticket = slot.ticket
        if ticket is None:
            return
        if event.ends or event.kind == "queued":
            slot.ticket = None
        if event.kind == "lost":
            self._lose(ticket, event.error)
        elif event.kind == "queued":
            ticket.tries -= 1
            self._wait_again(ticket)
        elif event.ends:
            self._end(ticket, event)
        else:
            ticket.tell(event)

    def _close(self, name: str, why: str) -> None:
        slot = self._slots.pop(name)
        if slot.ticket is not None:
            self._forget(slot.gang, losses=1)
            self._lose(slot.ticket, why)
        self._have_slots()

    def _forget(self, gang: str, losses: int = 0) -> None:
        """Count a gang no more, until it reports again.

        Args:
            losses: 1 where it is lost, which has its ranks started anew.
        """
        gone = self._gangs.pop(gang, None)
        self._restarts_before[gang] = (0 if gone is None else gone.said.restarts) + losses
        self._count()

    def _count(self) -> None:
        """Sums over gangs."""
        self.ready = any(gang.said.ready for gang in self._gangs.values())
        restarts = [gang.said.restarts for gang in self._gangs.values()]
        self.restarts = sum(restarts) + sum(self._restarts_before.values())
        usages: dict[int | str, Usage] = {}
        for number, (_, gang) in enumerate(sorted(self._gangs.items())):
            usages.update({f"{number}/{rank}": usage for rank, usage in gang.said.usages.items()})
        self.usages = usages

    async def _watch_gangs(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for name in [name for name, gang in self._gangs.items() if now - gang.heard > SILENT_S]:
                log.info("gang %s is not there any more", name)
                self._forget(name)
            if self._gangs or not self._queue:
                self._seen = now
            elif now - self._seen > self._patience_s:
                self._fail_all(f"there was no gang for {self._patience_s:.0f} s; see what the cluster has room for")


@dataclasses.dataclass(frozen=True)
class _Gang:
    """What is known of a gang.

    Args:
        said: its last report, without turns.
        heard: when, on `time.monotonic`'s clock.
    """

    said: GangReport
    heard: float


@dataclasses.dataclass(eq=False)
class _Slot:
    """An open call of a gang.

    Args:
        task: that hears what becomes of it.
        gang: that has asked which request it is for; empty before.
        ticket: of that request, while it is at work.
    """

    task: asyncio.Task[None]
    gang: str = ""
    ticket: Ticket | None = None
