"""The front process: the engine, and the HTTP application before it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from xdit_compile.errors import UsageError, XditCompileError

from .http.app import make_app
from .http.settings import Settings
from .logs import show_logs
from .queue.arrangements import Arrangement
from .queue.desk import LOOK_S
from .queue.engine import Engine
from .queue.processes import Processes
from .queue.starters import ProcessStarter
from .request import ServeRequest
from .room import Room

KEY_VARIABLE = "XDIT_COMPILE_API_KEY"


def serve(request: ServeRequest, arrangements: Sequence[Arrangement], host: str | None, here: int) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that are here then have `ServeRequest.drain` seconds to end.

    Args:
        arrangements: as `Engine` takes them.
        host: this machine's name for ranks that a launcher started; None where all are started here.
        here: how many ranks are on this machine.

    Raises:
        UsageError: the port is taken, the key cannot be read, or there is too little memory.
        XditCompileError: ranks that a launcher started were lost.
    """
    show_logs(request)
    settings = settings_of(request)
    room = None if request.force else Room(request, arrangements[-1].plan, here)
    if room is not None:
        room.check()
    command = ["serve_rank", request.to_json()]

    def processes() -> Processes:
        return Processes(ProcessStarter(command, host), arrangements[0], request.start_timeout)

    with _bound(request) as listening:
        address = "http://{}:{}".format(*listening.getsockname()[:2])
        engine = Engine(processes, request.limits, request.name, arrangements)
        app = make_app(engine, settings, None if room is None else room.refusal)
        print(f"serving {request.name} at {address}; Ctrl-C ends it", flush=True)
        asyncio.run(_until_ended(app, engine, listening, request, ends_with_ranks=host is not None))


async def _until_ended(
    app: Any, engine: Engine, listening: socket.socket, request: ServeRequest, ends_with_ranks: bool
) -> None:
    config = uvicorn.Config(
        app, log_config=None, lifespan="off", timeout_graceful_shutdown=max(1, round(request.drain)),
        access_log=request.verbose, server_header=False,
    )  # fmt: skip
    await engine.start()
    server = _Server(config, engine)
    watch = asyncio.create_task(_end_with_ranks(server, engine)) if ends_with_ranks else None
    try:
        await server.serve(sockets=[listening])
    finally:
        await engine.stop(0)
    if watch is not None and watch.done():
        raise XditCompileError("the ranks were lost, and whoever launched them has to start all processes anew")


async def _end_with_ranks(server: uvicorn.Server, engine: Engine) -> None:
    while engine.alive:
        await asyncio.sleep(LOOK_S)
    server.should_exit = True


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


def settings_of(request: ServeRequest) -> Settings:
    """Of the HTTP side.

    Raises:
        UsageError: the key cannot be read.
    """
    return Settings(api_key=_api_key(request), cors_origins=request.cors_origin, limits=request.most)


def _bound(request: ServeRequest) -> socket.socket:
    family = socket.AF_INET6 if ":" in request.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sends at once for this alone
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
