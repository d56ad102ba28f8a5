"""The routes that make images: base64 or a URL, at once or with server-sent events for each step."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from ..queue.tickets import Event, Ticket
from .encoding import TYPES, encode_images, pixels_of, tensor_file
from .forms import body_of, read_body
from .front import Front
from .problems import Problem, problem_of_end
from .schemas import DecodeRequest, ImageRequest

PICTURES = {"image": "image", "mask": "mask_image", "control_image": "control_image"}
"""Fields that are files, and the pipeline's arguments for them."""
LATENTS = "latents"
"""The field of the file that is decoded; in `ImageRequest.response_format`, that such a file is asked for."""
PIXELS = "pixels"
"""The same there: pictures as they are."""
NEEDED = ("image", "control_image")
"""Of these pictures an edit has one at least."""
ALIVE_S = 15.0
"""A stream says something at least so often, so that nothing between here and the client ends it."""
NO_TOKENS = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip


def image_routes(front: Front) -> APIRouter:
    """``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/images/decode``."""
    router = APIRouter(tags=["images"])

    @router.post("/v1/images/generations", response_model=None)
    async def generate(asked: ImageRequest, request: Request) -> dict[str, Any] | Response:
        """Make pictures from a text."""
        ticket = await front.submit(asked, request)
        return await _answer(front, asked, ticket, request, "image_generation")

    @router.post("/v1/images/edits", response_model=None, openapi_extra=body_of(ImageRequest, PICTURES, NEEDED))
    async def edit(request: Request) -> dict[str, Any] | Response:
        """Make pictures from a picture and a text."""
        asked, pictures = await read_body(request, ImageRequest, PICTURES, NEEDED)
        ticket = await front.submit(asked, request, pictures)
        return await _answer(front, asked, ticket, request, "image_edit")

    files = {**PICTURES, LATENTS: LATENTS}

    @router.post("/v1/images/decode", response_model=None, openapi_extra=body_of(DecodeRequest, files, [LATENTS]))
    async def decode(request: Request) -> dict[str, Any] | Response:
        """Make pictures of latents that a request of the same fields was answered with."""
        asked, pictures = await read_body(request, DecodeRequest, files, [LATENTS])
        latents = pictures.pop(LATENTS)
        ticket = await front.submit(asked, request, pictures, latents=latents)
        return await _answer(front, asked, ticket, request, "image_decode")

    return router


async def _answer(
    front: Front, asked: ImageRequest, ticket: Ticket, request: Request, name: str
) -> dict[str, Any] | Response:
    if asked.stream:
        return StreamingResponse(stream(front, asked, ticket, request, name), media_type="text/event-stream")
    try:
        event = await ticket.end()
    finally:
        front.engine.cancel(ticket.id)
    if event.kind != "done":
        raise problem_of_end(event)
    if (tensor := await _as_tensor(asked, ticket, event)) is not None:
        return {
            "id": ticket.id, "created": int(time.time()), "size": size_of(event), "seconds": seconds_of(ticket),
            "data": [tensor],
        }  # fmt: skip
    files = await encoded(front, asked, ticket, event)
    data = [{**placed(front, asked, request, file), "seed": ticket.work.seed + n} for n, file in enumerate(files)]
    return {
        "id": ticket.id, "created": int(time.time()), "background": "opaque", "output_format": format_of(asked),
        "size": size_of(event), "data": data, "seconds": seconds_of(ticket),
    }  # fmt: skip


async def _as_tensor(asked: ImageRequest, ticket: Ticket, event: Event) -> dict[str, Any] | None:
    """What was made of all samples as one file; None where pictures are asked for."""
    if event.latents is not None:
        name, file = LATENTS, event.latents
    elif event.kind == "done" and event.pictures is not None and asked.response_format == PIXELS:
        name, file = PIXELS, await asyncio.to_thread(tensor_file, PIXELS, pixels_of(event.pictures, event.shape))
    else:
        return None
    return {f"b64_{name}": base64.b64encode(file).decode(), "seed": ticket.work.seed}


async def encoded(front: Front, asked: ImageRequest, ticket: Ticket, event: Event) -> list[bytes]:
    """The files of an event's pictures; those of the last event say what they were made with."""
    assert event.pictures is not None
    pixels = pixels_of(event.pictures, event.shape)
    about = front.about(ticket.work) if event.kind == "done" else []
    started = time.monotonic()
    files = await asyncio.to_thread(encode_images, pixels, format_of(asked), asked.output_compression, about)
    front.metrics.spent("encode", time.monotonic() - started)
    return files


def format_of(asked: ImageRequest) -> str:
    """Of the files."""
    return asked.output_format or "png"


def size_of(event: Event) -> str:
    """WIDTHxHEIGHT of an event's pictures; ``auto`` of latents."""
    if event.latents is not None:
        return "auto"
    height, width = event.shape[-3:-1]
    return f"{width}x{height}"


def placed(front: Front, asked: ImageRequest, request: Request, file: bytes) -> dict[str, str]:
    """A picture itself, or its URL.

    Raises:
        Problem: it is too large to be kept.
    """
    if asked.response_format == "url":
        format = format_of(asked)
        return {"url": front.url_of(request, file, TYPES[format], format)}
    return {"b64_json": base64.b64encode(file).decode()}


def seconds_of(ticket: Ticket) -> dict[str, float]:
    """How long a request waited, and how long it was at work."""
    ended = ticket.ended or time.monotonic()
    started = ticket.started or ended
    return {"queued": round(started - ticket.arrived, 4), "made": round(ended - started, 4)}


async def stream(front: Front, asked: ImageRequest, ticket: Ticket, request: Request, name: str) -> AsyncIterator[str]:
    """What becomes of a request, as server-sent events.

    Events are ``NAME.queued``, ``NAME.started``, ``NAME.progress`` after each step, ``NAME.partial_image``,
    ``NAME.retried`` where ranks were lost, and for each picture, or once for latents and pixels, ``NAME.completed``;
    or ``error``, which ends it.

    Args:
        name: what events are called by, ``image_generation``, ``image_edit`` or ``image_decode``.
    """
    events, previews = ticket.events(), 0
    waiting: asyncio.Future[Event] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({waiting}, timeout=ALIVE_S))[0]:
                yield ": waiting\n\n"
            event = waiting.result()
            if event.kind == "preview" and previews >= (asked.partial_images or 0):
                continue
            for said in await _said(front, asked, ticket, request, event, previews):
                yield _line(f"{name}.{said.pop('type')}", ticket.id, said)
            previews += event.kind == "preview"
            if event.ends:
                return
    except Problem as problem:
        yield f"event: error\ndata: {json.dumps(problem.body)}\n\n"
    finally:
        front.engine.cancel(ticket.id)
        if waiting is not None:
            waiting.cancel()


async def _said(
    front: Front, asked: ImageRequest, ticket: Ticket, request: Request, event: Event, previews: int
) -> list[dict[str, Any]]:
    """What is said of an event.

    Raises:
        Problem: the request ended without a picture.
    """
    if event.kind in ("queued", "started", "retried"):
        return [{"type": event.kind}]
    if event.kind == "step":
        return [{"type": "progress", "step": event.step, "steps": event.steps, "seconds": seconds_of(ticket)}]
    if event.kind not in ("preview", "done"):
        raise problem_of_end(event)
    last = {"seconds": seconds_of(ticket), "usage": NO_TOKENS}
    if (tensor := await _as_tensor(asked, ticket, event)) is not None:
        made = {"created_at": int(time.time()), "size": size_of(event), **tensor}
        return [{"type": "completed", "index": 0, **made, **last}]
    ours: dict[str, Any] = {
        "output_format": format_of(asked), "size": size_of(event), "background": "opaque", "quality": "auto",
        "created_at": int(time.time()),
    }  # fmt: skip
    files = await encoded(front, asked, ticket, event)
    if event.kind == "preview":
        number = {"partial_image_index": previews, "step": event.step, "steps": event.steps}
        inline = asked.model_copy(update={"response_format": "b64_json"})
        return [
            {"type": "partial_image", **number, "index": n, **ours, **placed(front, inline, request, file)}
            for n, file in enumerate(files)
        ]
    return [
        {"type": "completed", "index": n, "seed": ticket.work.seed + n, **ours, **last,
         **placed(front, asked, request, file)}
        for n, file in enumerate(files)
    ]  # fmt: skip


def _line(type: str, id: str, said: dict[str, Any]) -> str:
    return f"event: {type}\ndata: {json.dumps({'type': type, 'id': id, **said})}\n\n"
