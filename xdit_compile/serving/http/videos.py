"""Videos: jobs that are asked for, looked at, fetched and deleted."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from ..queue.tickets import Event, Ticket
from .checks import public_name
from .encoding import TYPES, encode_images, encode_video, pixels_of
from .forms import body_of, read_body
from .front import Front
from .images import size_of
from .problems import Problem, problem_of_end
from .schemas import VideoRequest

log = logging.getLogger(__name__)
PICTURES = {"input_reference": "image"}
"""Fields that are files, and the pipeline's arguments for them."""
_FORMATS = {"video": "mp4", "thumbnail": "webp"}


@dataclasses.dataclass(eq=False)
class Job:
    """A video that was asked for.

    Args:
        asked: by its client.
        ticket: of the engine.
        files: names of what is kept of it, by what OpenAI calls variants.
        error: why there is none.
    """

    asked: VideoRequest
    ticket: Ticket
    id: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    completed: int | None = None
    size: str = ""
    frames: int | None = None
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    error: dict[str, Any] | None = None
    task: asyncio.Task[None] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it changes no more."""
        return self.status in ("completed", "failed")


class Jobs:
    """All videos that were asked for; those that ended first go where there are too many.

    Args:
        front: what all routes share.
    """

    def __init__(self, front: Front):
        self._front = front
        self._jobs: dict[str, Job] = {}

    async def begin(self, asked: VideoRequest, request: Request, pictures: dict[str, bytes]) -> Job:
        """Put a video into the queue.

        Raises:
            Problem: it is refused.
        """
        keep = self._front.settings.keep
        old = [job for job in self._jobs.values() if job.has_ended]
        if len(self._jobs) - len(old) >= keep.jobs:
            raise Problem(429, f"{keep.jobs} videos are at work or wait", headers={"Retry-After": "30"})
        ticket = await self._front.submit(asked, request, pictures, makes="videos", watch=False)
        for job in old[: max(0, len(self._jobs) + 1 - keep.jobs)]:
            self._forget(job)
        job = Job(asked, ticket, ticket.id)
        work, size = ticket.work, self._front.engine.facts.get("size")
        job.size = f"{work.width}x{work.height}" if work.width else f"{size[1]}x{size[0]}" if size else "auto"
        job.frames = work.num_frames
        self._jobs.pop(job.id, None)
        self._jobs[job.id] = job
        job.task = asyncio.create_task(self._follow(job))
        return job

    def of(self, id: str) -> Job:
        """The job of an id.

        Raises:
            Problem: there is none.
        """
        job = self._jobs.get(id)
        if job is None:
            raise Problem(404, "there is no video of that id", "video_id", "video_not_found")
        return job

    def all(self) -> list[Job]:
        """Every job, in the order in which they came."""
        return list(self._jobs.values())

    def delete(self, id: str) -> None:
        """Forget a video and what is kept of it; one that is not ready is cancelled.

        Raises:
            Problem: there is none.
        """
        job = self.of(id)
        if not job.has_ended:
            self._front.engine.cancel(id)
        self._forget(job)

    def _forget(self, job: Job) -> None:
        self._jobs.pop(job.id, None)
        for name in job.files.values():
            self._front.results.drop(name)

    async def _follow(self, job: Job) -> None:
        try:
            async for event in job.ticket.events():
                if event.kind == "started":
                    job.status = "in_progress"
                elif event.kind == "retried":
                    job.status = "queued"
            if event.kind != "done":
                raise problem_of_end(event)
            await self._keep(job, event)
            job.status = "completed"
        except Problem as problem:
            said = problem.body["error"]
            job.status, job.error = "failed", {"code": said["code"], "message": said["message"], "type": said["type"]}
        except Exception:
            log.exception("a video could not be written", extra={"request_id": job.id})
            job.status = "failed"
            job.error = {"code": "internal_error", "message": "the video could not be written", "type": "server_error"}
        finally:
            job.completed = int(time.time())

    async def _keep(self, job: Job, event: Event) -> None:
        assert event.pictures is not None
        frames = pixels_of(event.pictures, event.shape)[0]
        about = self._front.about(job.ticket.work)[0]
        started = time.monotonic()
        video = await asyncio.to_thread(encode_video, frames, job.asked.fps, about)
        first = await asyncio.to_thread(encode_images, frames[:1], _FORMATS["thumbnail"])
        self._front.metrics.spent("encode", time.monotonic() - started)
        if self._jobs.get(job.id) is not job:
            return
        job.frames, job.size = len(frames), size_of(event)
        for variant, data in (("thumbnail", first[0]), ("video", video)):
            ending = _FORMATS[variant]
            name = self._front.results.put(data, TYPES[ending], ending)
            if name is None:
                raise Problem(400, "the video is too large to be kept; ask for less", "size", "too_large")
            job.files[variant] = name


def video_routes(front: Front) -> APIRouter:
    """``/v1/videos``."""
    router, jobs = APIRouter(tags=["videos"]), Jobs(front)

    @router.post("/v1/videos", openapi_extra=body_of(VideoRequest, PICTURES))
    async def create(request: Request) -> dict[str, Any]:
        """Ask for a video; a job to look at."""
        asked, pictures = await read_body(request, VideoRequest, PICTURES)
        return _shown(front, await jobs.begin(asked, request, pictures))

    @router.get("/v1/videos")
    async def videos(
        after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> dict[str, Any]:
        """All videos that are known."""
        listed = jobs.all()[:: 1 if order == "asc" else -1]
        if after is not None:
            listed = listed[listed.index(jobs.of(after)) + 1 :]
        page = [_shown(front, job) for job in listed[: min(max(limit, 1), 100)]]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return {"object": "list", "data": page, "has_more": len(listed) > len(page), **ends}

    @router.get("/v1/videos/{id}")
    async def retrieve(id: str) -> dict[str, Any]:
        """How far a video is."""
        return _shown(front, jobs.of(id))

    @router.get("/v1/videos/{id}/content")
    async def content(id: str, variant: Literal["video", "thumbnail"] = "video") -> Response:
        """The file of a video that is ready, or its first frame."""
        job = jobs.of(id)
        if job.status != "completed":
            raise Problem(404, f"the video is {job.status}; ask /v1/videos/{id}", "video_id", "video_not_ready")
        file = front.results.get(job.files[variant])
        if file is None:
            raise Problem(404, "the video is not kept any more", "video_id", "video_expired")
        return Response(file.data, media_type=file.type)

    @router.delete("/v1/videos/{id}")
    async def delete(id: str) -> dict[str, Any]:
        """Forget a video; one that is not ready is cancelled."""
        jobs.delete(id)
        return {"id": id, "object": "video.deleted", "deleted": True}

    return router


def _shown(front: Front, job: Job) -> dict[str, Any]:
    """A job as OpenAI's clients read it."""
    ticket = job.ticket
    progress = 100 if job.status == "completed" else round(99 * ticket.step / ticket.steps) if ticket.steps else 0
    seconds = job.asked.seconds or (f"{job.frames / job.asked.fps:g}" if job.frames else "0")
    ready = job.completed if job.status == "completed" else None
    return {
        "id": job.id, "object": "video", "model": public_name(front.engine.model), "status": job.status,
        "progress": progress, "created_at": job.created, "completed_at": ready,
        "expires_at": ready and ready + int(front.settings.keep.seconds), "size": job.size, "seconds": seconds,
        "prompt": ticket.work.prompt, "error": job.error, "seed": ticket.work.seed, "step": ticket.step,
        "steps": ticket.steps,
    }  # fmt: skip
