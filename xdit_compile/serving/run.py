"""The front process: the engine, and the HTTP application before it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from pythonjsonlogger.json import JsonFormatter

from xdit_compile.errors import UsageError
from xdit_compile.plan.methods import METHODS

from .http.app import make_app
from .http.settings import Settings
from .queue.engine import Engine
from .queue.gang import Gang
from .request import ServeRequest

KEY_VARIABLE = "XDIT_COMPILE_API_KEY"
TURN_S = 3600.0
"""A turn that compiles may take long; what stands still is seen by the ranks themselves after the plan's timeout_s."""


def serve(request: ServeRequest, ranks: int) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are here then have `ServeRequest.drain` seconds to end.

    Raises:
        UsageError: the port is taken, or the key cannot be read.
    """
    _set_logs(request)
    settings = Settings(api_key=_api_key(request), cors_origins=request.cors_origin)
    command = ["serve_rank", str(request.max_batch), request.to_json()]
    name = request.model or "xdit-compile/shapes"
    with _bound(request) as listening:
        host, port = listening.getsockname()[:2]
        engine = Engine(
            lambda: Gang(command, ranks, request.start_timeout, TURN_S), request.limits, name, _plan_words(request)
        )
        app = make_app(engine, settings)
        print(f"serving {name} at http://{host}:{port}; Ctrl-C ends it", flush=True)
        asyncio.run(_until_ended(app, engine, listening, request))


async def _until_ended(app: Any, engine: Engine, listening: socket.socket, request: ServeRequest) -> None:
    config = uvicorn.Config(
        app, log_config=None, lifespan="off", timeout_graceful_shutdown=max(1, round(request.drain)),
        access_log=request.verbose, server_header=False,
    )  # fmt: skip
    await engine.start()
    try:
        await _Server(config, engine).serve(sockets=[listening])
    finally:
        await engine.stop(0)


class _Server(uvicorn.Server):
    """Ends at a signal after what is here was answered; a second one ends it at once. Neither is a failure."""

    def __init__(self, config: uvicorn.Config, engine: Engine):
        super().__init__(config)
        self._engine = engine

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.getsignal(number) for number in numbers]
        for number in numbers:
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _end(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = self._engine.draining = True


def _set_logs(request: ServeRequest) -> None:
    """Tell on stderr of requests and of ranks that are lost, in lines of text or in JSON objects."""
    fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
    handler = logging.StreamHandler()
    is_json = request.log_format == "json"
    handler.setFormatter(JsonFormatter(fields) if is_json else logging.Formatter(fields))
    level = logging.DEBUG if request.debug else logging.WARNING if request.quiet else logging.INFO
    for name in ("xdit_compile", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "xdit_compile" else max(level, logging.WARNING))


def _plan_words(request: ServeRequest) -> str:
    """The degrees of a plan that are more than one."""
    degrees = {method.name: getattr(request.plan, method.name) for method in METHODS}
    return ", ".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1) or "one device"


def _bound(request: ServeRequest) -> socket.socket:
    family = socket.AF_INET6 if ":" in request.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((request.host, request.port))
    except OSError as error:
        listening.close()
        raise UsageError(
            f"--host {request.host} --port {request.port}: {error.strerror}; give another --port"
        ) from error
    return listening


def _api_key(request: ServeRequest) -> str | None:
    """The key from its file, or the environment.

    Raises:
        UsageError: the file cannot be read, or is empty.
    """
    if request.api_key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = Path(request.api_key_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api_key_file {request.api_key_file} cannot be read: {error}") from error
    if not key:
        raise UsageError(f"--api_key_file {request.api_key_file} is empty")
    return key
