"""The server that a node starts: a process beside ComfyUI, whose own processes hold the pipeline.

ComfyUI's process never imports the compiler and never joins a process group, so what fails there leaves it alone.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import logging
import os
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO

from .client import Client

log = logging.getLogger("xdit_compile")
COMMAND = "XDIT_COMPILE_COMMAND"
"""The environment's word for another command in place of ``PYTHON -m xdit_compile``."""
KEY = "XDIT_COMPILE_API_KEY"
OURS = ("--host", "--port", "--api_key_file", "--cors_origin", "--with_parent", "--log_format", "--ray")
"""Flags that no workflow may give: they say who reaches the server."""
LOOK_S, END_S = 0.05, 15.0
LINES = 20
"""Of what the server said last, for the error."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server is started with; another one needs another server.

    Args:
        model: pipeline folder or id of the Hub; empty for the embedded pipeline.
        processes: that share the work, one on each device.
        plan: as `words_of` reads it.
        dtype, backend: as the command line has them.
        flags: more of the command line.
        stamp: of the model's files.
    """

    model: str = ""
    processes: int = 1
    plan: str = ""
    dtype: str = "auto"
    backend: str = "auto"
    flags: str = ""
    stamp: float = 0.0

    def check(self) -> None:
        """See what can be seen without a process.

        Raises:
            ValueError: a text cannot be read, or has a flag that no workflow may give.
        """
        for word in self.arguments:
            if word.partition("=")[0] in OURS:
                raise ValueError(f"{word.partition('=')[0]} is not for a workflow: the node itself starts the server")

    @property
    def arguments(self) -> list[str]:
        """Those of ``xdit-compile serve``.

        Raises:
            ValueError: a text cannot be read.
        """
        model = ["--model", self.model] if self.model else []
        common = ["--nproc", str(self.processes), "--dtype", self.dtype, "--backend", self.backend]
        return [*model, *common, *words_of(self.plan), *words_of(self.flags)]


def words_of(text: str) -> list[str]:
    """Flags in one text as words of a command line.

    Args:
        text: either as on the command line, ``--ulysses_degree 2 --use_parallel_vae``, or shorter, which is one item a
            comma or line: ``ulysses_degree=2, use_parallel_vae``.

    Raises:
        ValueError: a quote is not closed, or an item is no flag.
    """
    if text.lstrip().startswith("-"):
        try:
            return shlex.split(text)
        except ValueError as error:
            raise ValueError(f"{text!r} cannot be read: {error}") from error
    words = []
    for item in filter(None, (each.strip() for each in re.split(r"[,\n]", text))):
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"\w+", name.strip()):
            raise ValueError(f"{item!r} is no flag; write NAME=VALUE, NAME, or --NAME VALUE as on the command line")
        words += [f"--{name.strip()}", *([value.strip()] if equals else [])]
    return words


class Server:
    """A process of ``xdit-compile serve``, which ends with this one.

    Args:
        settings: of the server.

    Raises:
        ValueError: as `Settings.check`.
        RuntimeError: the command cannot be run.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.client: Client | None = None
        self._said: collections.deque[str] = collections.deque(maxlen=LINES)
        self._key = secrets.token_urlsafe(32)
        program = shlex.split(os.environ.get(COMMAND, "")) or [sys.executable, "-m", "xdit_compile"]
        ours = ["--host", "127.0.0.1", "--port", "0", "--with_parent", "--retry", "1", "--drain", "0"]
        try:
            self._process = subprocess.Popen(
                [*program, "serve", *settings.arguments, *ours], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, errors="replace", env={**os.environ, KEY: self._key},
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"{shlex.join(program)} cannot be run: {error.strerror}; see {COMMAND}") from error
        self._readers = [
            threading.Thread(target=read, args=(stream,), daemon=True)
            for read, stream in ((self._read_address, self._process.stdout), (self._read_log, self._process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def takes_requests(self) -> bool:
        """Whether it runs and can make pictures, at once or as soon as lost processes are there again."""
        return self.alive and self.client is not None and self.client.health() in ("ready", "starting")

    @property
    def last_words(self) -> str:
        """What the server said last, in one line."""
        lines = [line for line in self._said if line.strip()]
        errors = [line for line in lines if "error: " in line]
        return (errors or lines or ["it said nothing"])[-1].rpartition("error: ")[2].strip()

    def wait(self, look: Callable[[], None], say: Callable[[str], None]) -> Client:
        """Wait until it takes requests.

        Args:
            look: called again and again; what it raises ends the waiting.
            say: is told how it goes, once a second.

        Raises:
            RuntimeError: it ended, or its processes cannot be started.
        """
        begin, said = time.monotonic(), -1
        while True:
            look()
            health = self.client.health() if self.client else ""
            if self.client and health == "ready":
                say(f"ready after {time.monotonic() - begin:.0f} s")
                return self.client
            if not self.alive:
                for reader in self._readers:
                    reader.join(END_S)
                raise RuntimeError(self._why())
            if health == "dead":
                raise RuntimeError(f"the processes cannot be started: {self.last_words}")
            if (seconds := int(time.monotonic() - begin)) > said:
                said = seconds
                say(f"{self.settings.processes} processes are starting, {seconds} s")
            time.sleep(LOOK_S)

    def end(self) -> None:
        """End it, and with it its processes."""
        if self.client:
            self.client.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.terminate()
            self._process.wait(END_S)
            return
        self._process.kill()
        self._process.wait()

    def _why(self) -> str:
        if any("No module named xdit_compile" in line for line in self._said):
            return f"xdit_compile is not installed for {sys.executable}; install it there, or set {COMMAND}"
        return self.last_words

    def _read_address(self, stream: IO[str]) -> None:
        for line in stream:
            address = re.search(r"https?://[\w.:\[\]-]+", line)
            if address and not self.client:
                self.client = Client(address[0], self._key)
            log.info(line.rstrip())

    def _read_log(self, stream: IO[str]) -> None:
        for line in stream:
            self._said.append(line.rstrip())
            log.info(line.rstrip())


class Servers:
    """The one server that ComfyUI's process has at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._server: Server | None = None

    def ready(self, settings: Settings, look: Callable[[], None], say: Callable[[str], None],
              before: Callable[[], None]) -> Client:  # fmt: skip
        """A server of these settings that takes requests: the one that runs, if it has them, else a new one.

        Args:
            look, say: as `Server.wait` takes them.
            before: called before a new one is started.

        Raises:
            ValueError, RuntimeError: as `Server` and `Server.wait`.
        """
        with self._lock:
            if self._server is not None and self._server.settings == settings and self._server.takes_requests:
                assert self._server.client is not None
                return self._server.client
            settings.check()
            self._end()
            before()
            atexit.unregister(self.end)
            atexit.register(self.end)
            self._server = Server(settings)
            try:
                return self._server.wait(look, say)
            except BaseException:
                self._end()
                raise

    def end(self) -> None:
        """End the server, if there is one."""
        with self._lock:
            self._end()

    @property
    def pid(self) -> int | None:
        """Of the server's process; None where there is none."""
        return self._server.pid if self._server else None

    def _end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.end()
