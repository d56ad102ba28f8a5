"""The queue before gangs that come and go, with gangs that are functions of this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from xdit_compile.integrations.ray.dispatcher import Dispatcher
from xdit_compile.integrations.ray.reports import GangReport
from xdit_compile.serving.queue.desk import Full, Limits
from xdit_compile.serving.queue.messages import Work
from xdit_compile.serving.queue.tickets import Event
from xdit_compile.serving.room import Free


class Gangs:
    """So many, each of which works on one request at a time until it is told to end it.

    Attributes:
        begun: ids of requests, in the order in which gangs took them.
        calls: how often a slot was opened.
    """

    def __init__(self, count: int):
        self.begun: list[str] = []
        self.calls = 0
        self.ends = asyncio.Event()
        self.lost: set[str] = set()
        self.handed_back: set[str] = set()
        self.free = asyncio.Semaphore(count)
        self.dispatcher: Dispatcher | None = None

    @contextlib.asynccontextmanager
    async def open(self, slot: str) -> AsyncIterator[AsyncIterator[list[Event]]]:
        self.calls += 1
        yield self._work(slot)

    async def _work(self, slot: str) -> AsyncIterator[list[Event]]:
        assert self.dispatcher is not None
        async with self.free:
            work = self.dispatcher.take(slot, "gang")
            if work is None:
                return
            id = work.id
            self.begun.append(id)
            yield [Event("step", 1, 2)]
            if id in self.lost:
                self.lost.remove(id)
                raise ConnectionError("the replica died")
            if id in self.handed_back:
                self.handed_back.remove(id)
                yield [Event("lost", error="rank 1: its actor died")]
                return
            await self.ends.wait()
            yield [Event("step", 2, 2), Event("done", 2, 2, b"", (1, 1, 1, 3))]


def with_gangs(test: Callable[[Dispatcher, Gangs], Coroutine[Any, Any, None]], count: int = 1, **limits: int) -> None:
    async def run() -> None:
        gangs = Gangs(count)
        dispatcher = gangs.dispatcher = Dispatcher(gangs.open, Limits(**limits), "model", 0.6)
        dispatcher.start()
        dispatcher.report(GangReport("gang", {"joins": False}, "one device", True, Free(None), 0, {}))
        try:
            await asyncio.wait_for(test(dispatcher, gangs), 20)
        finally:
            await dispatcher.stop(0)

    asyncio.run(run())


async def _until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def test_the_next_request_is_the_first_of_the_highest_priority_when_a_gang_asks():
    async def test(dispatcher: Dispatcher, gangs: Gangs) -> None:
        tickets = [dispatcher.submit(Work("a", "a"))]
        await _until(lambda: gangs.begun == ["a"])
        tickets += [dispatcher.submit(Work(id, id), priority) for id, priority in (("b", 0), ("c", 5), ("d", 5))]
        given_up = dispatcher.submit(Work("e", "e"), 9)
        assert dispatcher.status()["queued"] == 4
        assert dispatcher.cancel("e")
        assert (await given_up.end()).kind == "cancelled"
        gangs.ends.set()
        assert [(await ticket.end()).kind for ticket in tickets] == ["done"] * 4
        assert gangs.begun == ["a", "c", "d", "b"]

    with_gangs(test)


def test_a_request_begins_again_where_its_gang_is_lost():
    async def test(dispatcher: Dispatcher, gangs: Gangs) -> None:
        gangs.lost.update({"a"})
        gangs.ends.set()
        ticket = dispatcher.submit(Work("a", "a"))
        kinds = [event.kind async for event in ticket.events()]
        assert kinds == ["queued", "started", "step", "retried", "started", "step", "step", "done"]
        assert dispatcher.status()["restarts"] == 1 and not dispatcher.ready

    with_gangs(test, retries=1)


def test_what_a_gang_hands_back_begins_again_wherever_there_is_room():
    async def test(dispatcher: Dispatcher, gangs: Gangs) -> None:
        gangs.handed_back.update("ab")
        gangs.lost.update("b")
        gangs.ends.set()
        tickets = [dispatcher.submit(Work(id, id)) for id in "ab"]
        kinds = [[event.kind async for event in ticket.events()] for ticket in tickets]
        again = ["queued", "started", "step", "retried", "started", "step"]
        assert kinds == [[*again, "step", "done"], [*again, "failed"]]
        assert tickets[1].last.error == "rank 1: its actor died; the request was lost with it"

    with_gangs(test, retries=1)


def test_without_retries_it_fails_and_the_next_goes_on():
    async def test(dispatcher: Dispatcher, gangs: Gangs) -> None:
        gangs.lost.update({"a"})
        gangs.ends.set()
        first, second = (dispatcher.submit(Work(id, id)) for id in "ab")
        event = await first.end()
        assert (event.kind, event.error) == (
            "failed",
            "a gang was lost (ConnectionError); the request was lost with it",
        )
        assert (await second.end()).kind == "done"

    with_gangs(test)


def test_a_request_at_work_is_given_up_and_its_gang_is_free():
    async def test(dispatcher: Dispatcher, gangs: Gangs) -> None:
        first, second = (dispatcher.submit(Work(id, id)) for id in "ab")
        await _until(lambda: gangs.begun == ["a"])
        assert dispatcher.cancel("a")
        assert (await first.end()).kind == "cancelled"
        await _until(lambda: gangs.begun == ["a", "b"])
        late = dispatcher.submit(Work("c", "c"), deadline_s=0.1)
        assert (await late.end()).kind == "late"
        with pytest.raises(Full):
            for number in range(9):
                dispatcher.submit(Work(f"{number}", ""))

    with_gangs(test, max_queue=4)


def test_requests_wait_so_long_for_a_gang_and_not_for_ever():
    async def test(dispatcher: Dispatcher, gangs: Gangs) -> None:
        gangs.begun.clear()
        dispatcher._forget("gang")
        ticket = dispatcher.submit(Work("a", "a"))
        event = await ticket.end()
        assert event.kind == "failed" and event.error.startswith("there was no gang for 1 s")
        assert gangs.begun == [] and dispatcher.status()["queued"] == 0 and gangs.calls == 1

    with_gangs(test, count=0)
