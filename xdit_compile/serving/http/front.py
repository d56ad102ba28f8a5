"""What all routes share: the engine, what is kept, and who still waits for an answer."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import Request

from xdit_compile import __version__

from ..queue.desk import Desk, Full, NotReady
from ..queue.messages import Work
from ..queue.tickets import Ticket
from .checks import check_latents, check_picture, work_of
from .metrics import Metrics
from .problems import NOT_AGAIN, Problem, problem_of_queue
from .results import Results
from .schemas import Asked
from .settings import Settings

Refusal = Callable[[Work], Awaitable[str | None]]
"""Says why there is too little memory for a request; None where there is enough."""


@dataclasses.dataclass(eq=False)
class Front:
    """What all routes share.

    Args:
        engine: takes the requests.
        settings: of the HTTP side.
        metrics: what is counted.
        results: files that are kept.
        refusal: why there is too little memory for a request; None where that is not asked.
    """

    engine: Desk
    settings: Settings
    metrics: Metrics
    results: Results
    refusal: Refusal | None = None
    _tickets: dict[str, Ticket] = dataclasses.field(default_factory=dict)
    _watching: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        self.engine.ended.append(self._forget)

    async def submit(
        self, asked: Asked, request: Request, pictures: Mapping[str, bytes] | None = None, makes: str = "images",
        watch: bool = True, latents: bytes | None = None,
    ) -> Ticket:  # fmt: skip
        """Check a request and put it into the queue.

        Args:
            pictures: encoded files by the names of the pipeline's arguments.
            makes: what the client wants, ``images`` or ``videos``.
            watch: cancel it as soon as the client is gone.
            latents: a file of what is only to be decoded.

        Raises:
            Problem: it is refused.
        """
        engine, pictures = self.engine, pictures or {}
        if not engine.facts and engine.alive:
            raise Problem(503, "the ranks are starting; try again soon", headers={"Retry-After": "2"})
        if engine.facts and engine.facts.get("makes", "images") != makes:
            where = "/v1/images/generations" if makes == "videos" else "/v1/videos"
            raise Problem(400, f"this pipeline makes {engine.facts['makes']}; ask {where}", code="unsupported")
        id, limits = self._free_id(request), self.settings.limits
        work = work_of(asked, id, pictures, engine.model, engine.facts, limits, latents)
        if latents is not None:
            await asyncio.to_thread(check_latents, latents)
        for name, data in pictures.items():
            await asyncio.to_thread(check_picture, data, name, limits)
        try:
            if self.refusal is not None and (why := await self.refusal(work)):
                raise Problem(507, why, "size", headers=NOT_AGAIN)
            ticket = engine.submit(work, asked.priority, asked.deadline)
        except (Full, NotReady) as error:
            raise problem_of_queue(error) from error
        self._tickets[work.id] = ticket
        if watch:
            task = asyncio.create_task(self._cancel_when_gone(request, ticket))
            self._watching.add(task)
            task.add_done_callback(self._watching.discard)
        return ticket

    def about(self, work: Work) -> list[dict[str, Any]]:
        """What each picture of a request is made with, for its file."""
        named = ("prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "num_frames",
                 "strength")  # fmt: skip
        facts = {name: value for name in named if (value := getattr(work, name)) is not None}
        return [
            {"Software": f"xdit-compile {__version__}", **facts, "seed": work.seed + number, "plan": self.engine.plan}
            for number in range(work.num_images)
        ]

    def url_of(self, request: Request, data: bytes, type: str, ending: str) -> str:
        """Keep a file, and say where it can be fetched.

        Raises:
            Problem: it is too large to be kept.
        """
        name = self.results.put(data, type, ending)
        if name is None:
            raise Problem(400, "this is too large to be kept; ask for b64_json", "response_format", "too_large")
        return str(request.url_for("kept_file", name=name))

    def _forget(self, ticket: Ticket) -> None:
        self._tickets.pop(ticket.id, None)

    def _free_id(self, request: Request) -> str:
        """The request's id, and more where another request of that id is at work."""
        wanted: str = request.state.request_id
        return wanted if wanted not in self._tickets else f"{wanted}.{secrets.token_hex(4)}"

    async def _cancel_when_gone(self, request: Request, ticket: Ticket) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if self._tickets.get(ticket.id) is ticket:
            self.engine.cancel(ticket.id)
