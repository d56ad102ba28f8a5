"""What the front holds of a request from its arrival to its answer."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Literal

from .messages import Work


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that became of a request.

    Args:
        kind: ``queued``, ``started``, ``step``, ``preview``, ``retried``, or one that ends it: ``done``, ``failed``,
            ``cancelled``, ``late`` (its deadline passed), ``lost`` (its ranks were, and who sent it there decides what
            becomes of it).
        step, steps: how far it is; ``steps`` None where that is not known.
        pictures, shape: raw bytes, uint8 ``[N, H, W, C]`` or ``[N, F, H, W, C]``, of a preview or of what was made.
        latents: a safetensors file of what was made, where that was not decoded.
        error: why it failed, in one line.
        is_input: whether the pipeline refused what it was given.
    """

    kind: Literal["queued", "started", "step", "preview", "retried", "done", "failed", "cancelled", "late", "lost"]
    step: int = 0
    steps: int | None = None
    pictures: bytes | None = None
    shape: tuple[int, ...] = ()
    latents: bytes | None = None
    error: str = ""
    is_input: bool = False

    @property
    def ends(self) -> bool:
        """Whether nothing follows."""
        return self.kind in ("done", "failed", "cancelled", "late", "lost")


@dataclasses.dataclass(eq=False)
class Ticket:
    """One request in the queue or at work.

    Args:
        work: what is to be made.
        priority: those of a higher one begin first.
        deadline: on `time.monotonic`'s clock; the request is given up then. None for none.
    """

    work: Work
    priority: int = 0
    deadline: float | None = None
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    started: float | None = None
    ended: float | None = None
    tries: int = 0
    step: int = 0
    steps: int | None = None
    last: Event | None = None
    _events: asyncio.Queue[Event] = dataclasses.field(default_factory=asyncio.Queue)

    @property
    def id(self) -> str:
        """Of the request."""
        return self.work.id

    def tell(self, event: Event) -> None:
        """Let whoever waits know; from the event loop alone. What follows the end is dropped."""
        if self.last is not None and self.last.ends:
            return
        self.step, self.steps = max(self.step, event.step), event.steps or self.steps
        self.last = event
        if event.ends:
            self.ended = time.monotonic()
        self._events.put_nowait(event)

    async def events(self) -> AsyncIterator[Event]:
        """What becomes of it, until its end; for one reader."""
        while True:
            event = await self._events.get()
            yield event
            if event.ends:
                return

    async def end(self) -> Event:
        """The event that ends it."""
        return [event async for event in self.events()][-1]
