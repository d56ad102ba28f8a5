"""The app: its routes, and what stands before them."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse

from xdit_compile import __version__

from ..queue.desk import Desk
from .checks import arguments_of, public_name
from .docs import PAGE, docs_routes, with_key
from .front import Front, Refusal
from .guard import Guard
from .images import image_routes
from .metrics import Metrics
from .problems import Problem, handle_problems
from .results import Results
from .settings import Settings
from .videos import video_routes


def make_app(engine: Desk, settings: Settings, refusal: Refusal | None = None) -> FastAPI:
    """The app of a server; whoever runs it starts and stops the engine.

    Args:
        engine: takes the requests.
        settings: of the HTTP side.
        refusal: why there is too little memory for a request; asked before it waits.
    """
    about = "Images and videos, as OpenAI's API has them."
    app = FastAPI(title="xdit-compile", version=__version__, description=about, docs_url=None, redoc_url=None)
    front = Front(engine, settings, Metrics(engine), Results(settings.keep), refusal)
    handle_problems(app)
    for routes in (image_routes, video_routes, model_routes, state_routes):
        app.include_router(routes(front), dependencies=with_key(settings.api_key is not None))
    app.include_router(page_routes())
    app.add_middleware(Guard, settings=settings, metrics=front.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )  # fmt: skip
    return app


def model_routes(front: Front) -> APIRouter:
    """``/v1/models``."""
    router, engine, since = APIRouter(tags=["models"]), front.engine, int(time.time())
    model = {"id": public_name(engine.model), "object": "model", "created": since, "owned_by": "xdit-compile"}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [{**model, **_shown(engine.facts)}]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """What is known of it."""
        if name not in (model["id"], engine.model):
            raise Problem(404, f"there is no model of that name; this is {model['id']}", "model", "model_not_found")
        return {**model, **_shown(engine.facts)}

    return router


def state_routes(front: Front) -> APIRouter:
    """How the server is, what goes on, what is kept."""
    router, engine = APIRouter(tags=["state"]), front.engine

    @router.get("/v1/status")
    async def status() -> dict[str, Any]:
        """What goes on: queue, requests at work, plan, ranks."""
        return {"ready": engine.ready and not engine.draining, **engine.status()}

    @router.delete("/v1/requests/{id}")
    async def cancel(id: str) -> dict[str, Any]:
        """Give a request up; its id is the X-Request-Id that it was sent with or answered with."""
        if not engine.cancel(id):
            raise Problem(404, "there is no request of that id in the queue or at work", "id")
        return {"id": id, "object": "request.cancelled", "cancelled": True}

    @router.get("/v1/files/{name}")
    async def kept_file(name: str) -> Response:
        """A file that was answered as a URL."""
        file = front.results.get(name)
        if file is None:
            raise Problem(404, "there is no such file any more", code="file_not_found")
        return Response(file.data, media_type=file.type, headers={"Cache-Control": "private, max-age=3600"})

    @router.get("/health/live")
    async def live() -> JSONResponse:
        """Whether the server can still become ready."""
        return JSONResponse({"status": "live" if engine.alive else "dead"}, 200 if engine.alive else 503)

    @router.get("/health/ready")
    @router.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are taken and the ranks are there."""
        ready = engine.alive and engine.ready and not engine.draining
        word = "ready" if ready else "draining" if engine.draining else "starting" if engine.alive else "dead"
        return JSONResponse({"status": word, "alive": engine.alive, "ready": ready}, 200 if ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def page_routes() -> APIRouter:
    """The page, and that of the documentation."""
    router = docs_routes(_policy(PAGE, "script-src 'self'", "style-src 'self' 'unsafe-inline'"))
    text = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    policy = {"Content-Security-Policy": _policy(text), "Referrer-Policy": "no-referrer"}

    @router.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(text, headers=policy)

    return router


def _shown(facts: Any) -> dict[str, Any]:
    """What clients may know of the pipeline."""
    named = ("class", "makes", "takes", "joins", "device", "dtype", "size", "steps")
    shown = {name: facts[name] for name in named if name in facts}
    return {**shown, "arguments": arguments_of(facts.get("takes", ()))}


def _policy(page: str, *more: str) -> str:
    """What a browser lets a page do: its own script and style, this server, and pictures that it holds.

    Args:
        more: sources beside those, such as ``script-src 'self'``.
    """
    also = dict(each.split(" ", 1) for each in more)

    def digests(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in texts]
        return " ".join(f"'sha256-{each}'" for each in hashes)

    return (
        f"default-src 'none'; script-src {also.get('script-src', '')} {digests('script')}; "
        f"style-src {also.get('style-src', '')} {digests('style')}; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
