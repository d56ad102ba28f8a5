"""A real server of two processes, its clients, and what the pipeline makes without it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from PIL import Image

from xdit_compile.cli.options.request import DEMO_PIPELINE

READY_S = 600.0
ANSWER_S = 900.0
LOOK_S = 0.02
"""So often `/health` is asked."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a request.

    Args:
        status: of HTTP.
        body: the JSON.
        seconds: until all of it was here.
    """

    status: int
    body: dict[str, Any]
    seconds: float

    @property
    def picture(self) -> np.ndarray:
        """The first picture, int ``[H, W, 3]``."""
        data = base64.b64decode(self.body["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


class Server:
    """One that runs.

    Args:
        process: the front.
        address: URL without a path.

    Attributes:
        ready_s, get_s, answer_s: how long it may take to be ready, to answer at once, and to make a picture.
    """

    ready_s, get_s, answer_s = READY_S, 30.0, ANSWER_S

    def __init__(self, process: subprocess.Popen[str], address: str):
        self.process, self.address = process, address

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a path."""
        try:
            with urllib.request.urlopen(self.address + path, timeout=self.get_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def ask(self, **fields: Any) -> Answer:
        """Send a request for pictures; ``id`` becomes its X-Request-Id."""
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(self._request(fields), timeout=self.answer_s) as answer:
                status, body = answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            status, body = error.code, json.load(error)
        return Answer(status, body, time.perf_counter() - begin)

    def picture(self, **fields: Any) -> np.ndarray:
        """The picture of a request that must succeed, int ``[H, W, 3]``."""
        answer = self.ask(**fields)
        assert answer.status == 200, answer.body
        return answer.picture

    def events(self, **fields: Any) -> Iterator[dict[str, Any]]:
        """The server-sent events of a request."""
        with urllib.request.urlopen(self._request({**fields, "stream": True}), timeout=self.answer_s) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    def cancel(self, id: str) -> int:
        """Give a request up; the status of the answer."""
        try:
            request = urllib.request.Request(f"{self.address}/v1/requests/{id}", method="DELETE")
            with urllib.request.urlopen(request, timeout=self.get_s) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def wait_ready(self) -> float:
        """Seconds until it takes requests and its ranks are there."""
        begin = time.monotonic()
        while time.monotonic() - begin < self.ready_s:
            with contextlib.suppress(OSError):
                if self.get("/health/ready")[0] == 200:
                    return time.monotonic() - begin
            time.sleep(LOOK_S)
        raise TimeoutError("the server was not ready in time")

    def ranks(self) -> list[psutil.Process]:
        """The processes of its ranks."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [each for each in children if _is_rank(each)]

    def processor_seconds(self) -> float:
        """Processor time that front and ranks have used so far."""
        times = [each.cpu_times() for each in (psutil.Process(self.process.pid), *self.ranks())]
        return sum(each.user + each.system for each in times)

    def _request(self, fields: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if "id" in fields:
            headers["X-Request-Id"] = fields.pop("id")
        return urllib.request.Request(f"{self.address}/v1/images/generations", json.dumps(fields).encode(), headers)


S = TypeVar("S", bound=Server)


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "serve_rank" in process.cmdline()
    except psutil.Error:
        return False


def processes(word: str) -> list[psutil.Process]:
    """Of this machine, those whose command line has a word in it."""
    running = []
    for process in psutil.process_iter(["cmdline"]):
        if any(word in each for each in process.info["cmdline"] or ()):
            running.append(process)
    return running


@contextlib.contextmanager
def serving(
    flags: tuple[str, ...], log: Path, kind: type[S] = Server, environment: dict[str, str] | None = None
) -> Iterator[S]:
    """A server of two processes that is ready, which ends with the context.

    Args:
        kind: its client.
        environment: what is in it beside that of this process.
    """
    command = [sys.executable, "-m", "xdit_compile", "serve", "--port", "0", "--nproc", "2", *flags]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env={**os.environ, **(environment or {})}
        )
    try:
        assert process.stdout is not None
        address = re.search(r"http://[\d.:]+", process.stdout.readline())
        assert address is not None, log.read_text()
        server = kind(process, address[0])
        server.wait_ready()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def alone(requests: list[dict[str, Any]]) -> list[np.ndarray]:
    """What the pipeline makes of requests without a server, on one process; int ``[H, W, 3]``."""
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(str(DEMO_PIPELINE))
    pipe.set_progress_bar_config(disable=True)
    return [called(pipe, dict(request)) for request in requests]


def called(pipe: Any, request: dict[str, Any]) -> np.ndarray:
    """The first picture that a pipeline makes of a request, int ``[H, W, 3]``."""
    generator = torch.Generator("cpu").manual_seed(request.pop("seed"))
    result = pipe(**request, generator=generator, output_type="np")
    return (result.images[0] * 255).round().astype(int)


class Watch:
    """Asks `/health` again and again in a thread of its own; ``seconds`` are those that the answers took."""

    def __init__(self, server: Server):
        self.seconds: list[float] = []
        self._server, self._ends = server, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ends.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ends.wait(LOOK_S):
            begin = time.perf_counter()
            self._server.get("/health")
            self.seconds.append(time.perf_counter() - begin)
