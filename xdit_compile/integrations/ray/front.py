"""The replica of Ray Serve that speaks HTTP: the same application as that of a server without Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from xdit_compile.serving.http.app import make_app
from xdit_compile.serving.http.settings import Settings
from xdit_compile.serving.logs import show_logs
from xdit_compile.serving.queue.messages import Work
from xdit_compile.serving.queue.tickets import Event
from xdit_compile.serving.request import ServeRequest
from xdit_compile.serving.room import Room

from .dispatcher import Dispatcher
from .reports import GangReport


class Front:
    """Holds the queue, and answers.

    Args:
        gangs: to which requests go.
        request_json: what the server was started with, a `ServeRequest`.
        settings: of the HTTP side.
        job: an actor that is there as long as the job that wants this service; None for one that stays.
    """

    def __init__(self, gangs: DeploymentHandle, request_json: str, settings: Settings, job: ActorHandle | None = None):
        request = ServeRequest.from_json(request_json)
        show_logs(request)
        self._request, self._settings = request, settings
        self._room: Room | None = None
        self._gangs = gangs.options(stream=True)
        self._dispatcher = Dispatcher(self._slot, request.limits, request.name, request.start_timeout)
        self._dispatcher.start()
        self._ending = None if job is None else asyncio.create_task(self._end_with(job))

    def __serve_build_asgi_app__(self) -> Any:
        """For Serve: what answers HTTP."""
        app = make_app(self._dispatcher, self._settings, self._refusal)
        app.add_middleware(_WithoutId)
        return app

    async def _refusal(self, work: Work) -> str | None:
        """As `Room.refusal`, of the memory that ranks had where they are."""
        free, request = self._dispatcher.free, self._request
        if free is None or request.force:
            return None
        if self._room is None or self._room.free != free:
            self._room = Room(request, request.arrangements[-1].plan, request.plan.world_size, free)
        return await self._room.refusal(work)

    async def take(self, slot: str, gang: str) -> Work | None:
        """As `Dispatcher.take`."""
        return self._dispatcher.take(slot, gang)

    async def report(self, said: GangReport) -> tuple[str, ...]:
        """As `Dispatcher.report`."""
        return self._dispatcher.report(said)

    async def stop(self, drain_s: float) -> None:
        """As `Dispatcher.stop`."""
        await self._dispatcher.stop(drain_s)

    @contextlib.asynccontextmanager
    async def _slot(self, slot: str) -> AsyncIterator[AsyncIterator[list[Event]]]:
        answers: Any = self._gangs.work.remote(slot)
        try:
            yield answers
        except BaseException:
            answers.cancel()
            raise

    async def _end_with(self, job: ActorHandle) -> None:
        """End the service once a job has ended without having done so."""
        name = serve.get_replica_context().app_name
        with contextlib.suppress(RayError):
            await job.last.remote()
        await self._dispatcher.stop(0)
        await asyncio.to_thread(serve.delete, name)

    async def __del__(self) -> None:
        dispatcher = getattr(self, "_dispatcher", None)
        if dispatcher is not None:
            await dispatcher.stop(0)


class _WithoutId:
    """Leaves a request's id out of its answer: Serve puts it there, too."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def without(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, without)
