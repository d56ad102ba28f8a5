"""The HTTP side before the real queue, with ranks that answer at once: fields, limits, errors, keys, the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from xdit_compile.plan import Plan
from xdit_compile.serving.http.app import make_app
from xdit_compile.serving.http.front import Refusal
from xdit_compile.serving.http.results import Results
from xdit_compile.serving.http.settings import Keep, Limits, Settings
from xdit_compile.serving.queue.arrangements import Arrangement
from xdit_compile.serving.queue.desk import Limits as QueueLimits
from xdit_compile.serving.queue.engine import Engine
from xdit_compile.serving.queue.messages import Report, Told, Turn, Usage, Work

METRICS = {
    "xdit_queue": "gauge", "xdit_running": "gauge", "xdit_ready": "gauge", "xdit_steps_per_second": "gauge",
    "xdit_batch_size": "histogram", "xdit_time_to_start_seconds": "histogram", "xdit_request_seconds": "histogram",
    "xdit_steps": "counter", "xdit_phase_seconds": "counter", "xdit_failures": "counter", "xdit_restarts": "counter",
    "xdit_shifts": "counter", "xdit_http_responses": "counter", "xdit_collective_bytes": "counter",
    "xdit_rank_resident_bytes": "gauge", "xdit_rank_device_bytes": "gauge",
}  # fmt: skip
"""What Prometheus is told, and of which type."""
TAKES = "prompt negative_prompt num_inference_steps guidance_scale height width image mask_image".split()
KINDS = {"clean_caption": ["bool", "True"], "timesteps": ["Optional[List[int]]", None]}
FACTS = {
    "class": "Tiny", "makes": "images", "takes": [*TAKES, *KINDS], "joins": True, "size": [16, 24], "steps": 4,
    "kinds": KINDS,
}  # fmt: skip


class Ranks:
    """Stand in for `Processes` and their only gang.

    Each step takes ``step_s``, and what is made follows from seed and step alone.
    """

    def __init__(self, step_s: float = 0.0, **facts: Any):
        self.facts, self.step_s = {**FACTS, **facts}, step_s
        self.gangs, self.usages, self.may_restart = [self], {0: Usage(900, 0, 0)}, True
        self.works: list[Work] = []
        self.cancelled: list[str] = []
        self._steps: dict[str, int] = {}
        self._works: dict[str, Work] = {}

    def start(self) -> None: ...
    def look(self) -> None: ...
    def kill(self) -> None: ...
    def end(self) -> None: ...

    def exchange(self, turn: Turn) -> list[Report]:
        told = {}
        for work in turn.start:
            self.works.append(work)
            self._works[work.id], self._steps[work.id] = work, 0
            told[work.id] = self._failure(work) or Told("waits", "key", 0, _steps(work))
        for id in turn.cancel:
            self.cancelled.append(id)
            told[id] = Told("cancelled")
        if turn.run:
            time.sleep(self.step_s)
        for id in turn.run:
            work, step = self._works[id], self._steps[id] + 1
            self._steps[id] = step
            pixels = self.pixels(work, step)
            seen = pixels.tobytes(), pixels.shape
            if step == _steps(work):
                told[id] = Told("done", "", step, step, pictures=seen[0], shape=seen[1])
            else:
                is_due = work.preview_every and step % work.preview_every == 0
                told[id] = Told("waits", "key", step, _steps(work), preview=seen if is_due else None)
        return [Report(0, told, {"denoiser": 0.5}, Usage(1000, 500, 64))]

    def pixels(self, work: Work, step: int) -> np.ndarray:
        """uint8 ``[N, H, W, C]``, or ``[1, F, H, W, C]`` of a video."""
        size = work.height or 16, work.width or 24
        if self.facts["makes"] == "videos":
            return np.full((1, work.num_frames or 3, *size, 3), step, np.uint8)
        seeds = work.seed + np.arange(work.num_images).reshape(-1, 1, 1, 1)
        return (np.arange(size[0] * size[1] * 3).reshape(1, *size, 3) + seeds + step).astype(np.uint8)

    @staticmethod
    def _failure(work: Work) -> Told | None:
        kinds = {"refuse me": "input", "break": "internal"}
        return Told("failed", error="so it is", kind=kinds[work.prompt]) if work.prompt in kinds else None


def _steps(work: Work) -> int:
    return work.num_inference_steps or 4


class Server:
    """A server on a port of its own, and clients of it."""

    def __init__(self, port: int, ranks: Ranks, engine: Engine):
        self.port, self.ranks, self.engine = port, ranks, engine
        self._clients: list[openai.OpenAI] = []

    def close(self) -> None:
        """End all connections of its clients."""
        for client in self._clients:
            client.close()

    def client(self, key: str = "none") -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}/v1"
        self._clients.append(openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=20))
        return self._clients[-1]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers, and what was answered: JSON as data, else bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            if body is not None and not isinstance(body, bytes | str):
                body, headers = json.dumps(body), {"Content-Type": "application/json", **headers}
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            data = response.read()
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status, response.headers, json.loads(data) if is_json else data

    def refused(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and error of what is no success; the form of OpenAI's errors is looked at."""
        status, _, answer = self.ask(method, path, body, **headers)
        assert set(answer) == {"error"}, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["message"] and "\n" not in answer["error"]["message"]
        return status, answer["error"]


@contextlib.contextmanager
def served(
    ranks: Ranks, settings: Settings | None = None, refusal: Refusal | None = None, **limits: Any
) -> Iterator[Server]:
    """A server for a block of code, ready."""
    listening = socket.create_server(("127.0.0.1", 0))
    made: list[Any] = []
    up = threading.Event()

    async def run() -> None:
        engine = Engine(lambda: ranks, QueueLimits(**limits), "tiny", [Arrangement(Plan(ulysses=2))])
        app = make_app(engine, settings or Settings(), refusal)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        server.install_signal_handlers = lambda: None
        made.extend((engine, server))
        await engine.start()
        while not engine.ready and engine.alive:
            await asyncio.sleep(0.005)
        up.set()
        await server.serve(sockets=[listening])
        await engine.stop(0)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert up.wait(10)
        with contextlib.closing(Server(listening.getsockname()[1], ranks, made[0])) as server:
            yield server
    finally:
        made[1].should_exit = made[1].force_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def images() -> Iterator[Server]:
    """A server that makes images."""
    limits = Limits(json_bytes=100_000, form_bytes=200_000, body_s=0.5, picture_pixels=10_000, total_pixels=1 << 22)
    with served(Ranks(), Settings(limits=limits)) as server:
        yield server


def _picture(size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, format)
    return buffer.getvalue()


def _until(holds: Any) -> None:
    limit = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_openai_client_gets_the_pixels_that_were_made(images: Server):
    extra = {"num_inference_steps": 3, "seed": 7, "guidance_scale": 2, "arguments": {"clean_caption": False}}
    answer = images.client().images.generate(prompt="a red square", n=2, size="32x16", model="tiny", extra_body=extra)
    work = images.ranks.works[-1]
    assert (work.height, work.width, work.guidance_scale) == (16, 32, 2.0)
    assert (work.arguments, work.num_images) == ({"clean_caption": False}, 2)
    for number, each in enumerate(answer.data):
        file = Image.open(io.BytesIO(base64.b64decode(each.b64_json)))
        assert np.array_equal(np.asarray(file), images.ranks.pixels(work, 3)[number])
        assert (file.text["prompt"], file.text["seed"], each.seed) == ("a red square", str(7 + number), 7 + number)
    assert answer.size == "32x16" and answer.output_format == "png"
    seeds = {images.client().images.generate(prompt="a").data[0].seed for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_other_formats_under_urls_say_what_they_were_made_with(images: Server, format: str):
    client = images.client()
    answer = client.images.generate(
        prompt="é" * 16_000, output_format=format, response_format="url", output_compression=90
    )
    status, headers, data = images.ask("GET", answer.data[0].url.partition(str(images.port))[2])
    assert (status, headers["content-type"]) == (200, f"image/{format}")
    file = Image.open(io.BytesIO(data))
    assert file.format == format.upper() and json.loads(file.getexif()[0x010E])["seed"] == answer.data[0].seed
    status, error = images.refused("GET", "/v1/files/..%2f..%2fetc%2fpasswd")
    assert status == 404


def test_a_stream_has_every_step_and_pictures_between(images: Server):
    extra = {"num_inference_steps": 6, "seed": 1}
    events = list(images.client().images.generate(prompt="a", stream=True, partial_images=2, extra_body=extra))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds[:2] == ["queued", "started"] and kinds[-1] == "completed"
    assert [(event.step, event.steps) for event in events if event.type.endswith("progress")] == [
        (step, 6) for step in range(1, 7)
    ]
    work = images.ranks.works[-1]
    partial = [event for event in events if event.type.endswith("partial_image")]
    assert [event.partial_image_index for event in partial] == [0, 1]
    for event, step in ((partial[0], 2), (partial[1], 4), (events[-1], 6)):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(event.b64_json))))
        assert np.array_equal(pixels, images.ranks.pixels(work, step)[0])
    assert events[-1].usage.total_tokens == 0
    with pytest.raises(openai.APIError, match="so it is"):
        list(images.client().images.generate(prompt="break", stream=True))


def test_edits_take_files_and_data_urls(images: Server):
    file = ("a.png", _picture())
    answer = images.client().images.edit(
        image=file, mask=file, prompt="a", n=2, extra_body={"seed": 3, "arguments": {"clean_caption": True}}
    )
    work = images.ranks.works[-1]
    assert work.pictures == {"image": file[1], "mask_image": file[1]}
    assert (work.seed, work.num_images, work.arguments, len(answer.data)) == (3, 2, {"clean_caption": True}, 2)
    events = list(images.client().images.edit(image=[file], prompt="a", stream=True))
    assert events[-1].type == "image_edit.completed"
    url = "data:image/jpeg;base64," + base64.b64encode(_picture(format="JPEG")).decode()
    assert images.ask("POST", "/v1/images/edits", {"prompt": "a", "image": url})[0] == 200


def test_pictures_that_are_none_or_too_large_are_refused(images: Server):
    whole, bomb, jpeg = _picture(), bytearray(_picture()), io.BytesIO()
    Image.effect_noise((64, 64), 50).save(jpeg, "JPEG")
    bomb[16:24] = (40_000).to_bytes(4, "big") * 2
    for data, words in (
        (b"GIF89a nothing", "no whole"), (whole[:-20], "no whole"), (jpeg.getvalue()[:1500], "no whole"),
        (bytes(bomb), "no whole|pixels"), (_picture((101, 100)), "10100 pixels; 10000 are the most"),
        (_picture(format="BMP"), "no whole"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=words):
            images.client().images.edit(image=("a.png", data), prompt="a")
    for url in ("file:///etc/passwd", "/etc/passwd", "http://127.0.0.1/a.png", "data:image/png;base64,???"):
        status, error = images.refused("POST", "/v1/images/edits", {"prompt": "a", "image": url})
        assert (status, error["param"]) == (400, "image")
    assert images.refused("POST", "/v1/images/edits", {"prompt": "a"})[1]["code"] == "missing_required_parameter"


REFUSED = [
    ({}, "prompt", "prompt is missing"),
    ({"prompt": " "}, "prompt", "empty"),
    ({"prompt": ["a"]}, "prompt", "string"),
    ({"prompt": "a" * 40_000}, "prompt", "40000 bytes; 32768 are the most"),
    ({"negative_prompt": "a" * 40_000}, "negative_prompt", "32768"),
    ({"size": "100000x10000"}, "size", "8192 are the most"),
    ({"size": "8000x8000"}, "size", "64000000 pixels a picture"),
    ({"size": "0x8"}, "size", "no pixels"),
    ({"size": "large"}, "size", "pattern"),
    ({"height": 8}, "width", "width"),
    ({"height": 8, "width": 8, "size": "16x16"}, "size", "differ"),
    ({"size": "2048x1024", "n": 4}, "n", "8388608 pixels in all; 4194304 are the most"),
    ({"n": 11}, "n", "10 are the most"),
    ({"n": 0}, "n", "greater"),
    ({"n": "2"}, "n", "integer"),
    ({"n": True}, "n", "integer"),
    ({"num_inference_steps": 10**9}, "num_inference_steps", "1000 are the most"),
    ({"seed": -1}, "seed", "greater"),
    ({"strength": 0.5}, "strength", "does not take strength"),
    ({"num_inference_step": 4}, "num_inference_step", "did you mean num_inference_steps?"),
    ({"arguments": {"clean_captions": 1}}, "arguments.clean_captions", "did you mean clean_caption?"),
    ({"arguments": {"generator": 1}}, "arguments.generator", "field of its own"),
    ({"arguments": {"image": "/etc/passwd"}}, "arguments.image", "picture"),
    ({"arguments": {"clean_caption": "\ud800"}}, "arguments.clean_caption", "character"),
    ({"arguments": {"clean_caption": 10**9}}, "arguments.clean_caption", "beyond 10000"),
    ({"arguments": {"clean_caption": [1] * 1001}}, "arguments.clean_caption", "1001 values; 1000 are the most"),
    ({"arguments": [1]}, "arguments", "dictionary"),
    ({"arguments": {"timesteps": "x"}}, "arguments.timesteps", "takes a list such as [1, 2] or null"),
    ({"arguments": {"clean_caption": "yes"}}, "arguments.clean_caption", "takes true or false"),
    ({"model": "other"}, "model", "not served here"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"deadline": 0}, "deadline", "greater"),
]


@pytest.mark.parametrize(
    ("fields", "param", "words"), REFUSED, ids=[f"{i}-{each[1]}" for i, each in enumerate(REFUSED)]
)
def test_wrong_fields_are_refused_before_anything_runs(images: Server, fields: dict, param: str, words: str):
    count = len(images.ranks.works)
    body = {"prompt": "a", **fields} if fields else {}
    status, error = images.refused("POST", "/v1/images/generations", body)
    assert (status, error["param"]) == (404 if param == "model" else 400, param)
    assert words in error["message"] and len(error["message"]) < 400
    assert len(images.ranks.works) == count


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "[" * 50_000, '{"prompt": "a", "guidance_scale": NaN}', '{"prompt": "a", "seed": 1e400}', "\xff"],
)
def test_bodies_that_are_no_json_are_refused(images: Server, body: str):
    status, _ = images.refused(
        "POST", "/v1/images/generations", body.encode("latin-1"), Content_Type="application/json"
    )
    assert status == 400


def test_large_and_slow_bodies_and_wrong_paths_are_refused(images: Server):
    path = "/v1/images/generations"
    assert images.refused("POST", path, {"prompt": "a" * 1_000_000})[0] == 413
    with socket.create_connection(("127.0.0.1", images.port), timeout=5) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n".encode() + b" " * 1000)
        time.sleep(0.1)
        connection.sendall(b" " * 999_000)
        assert connection.recv(1000).split()[1] == b"413"
    chunks = b"".join(b"2710\r\n" + b" " * 10_000 + b"\r\n" for _ in range(11)) + b"0\r\n\r\n"
    for head, rest, status in ((b"Transfer-Encoding: chunked", chunks, b"413"), (b"Content-Length: 9", b"{", b"408")):
        with socket.create_connection(("127.0.0.1", images.port), timeout=5) as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                + head + b"\r\n\r\n" + rest
            )  # fmt: skip
            assert connection.recv(1000).split()[1] == status
    assert images.refused("GET", "/v1/nothing")[0] == 404
    assert images.refused("PUT", path)[0] == 405
    assert images.refused("POST", "/v1/videos", {"prompt": "a"})[1]["code"] == "unsupported"
    assert images.refused("POST", path, b'{"prompt": "a"}', Content_Type="text/plain")[0] == 400


def test_what_the_pipeline_refuses_is_400_and_what_breaks_500(images: Server):
    for prompt, status in (("refuse me", 400), ("break", 500)):
        assert images.refused("POST", "/v1/images/generations", {"prompt": prompt})[0] == status


def test_a_key_and_other_sites():
    settings = Settings(api_key="sesame", cors_origins=("https://friend.example",))
    with served(Ranks(), settings) as server:
        assert server.client("sesame").models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            server.client("Sesame").models.list()
        for path in ("/v1/status", "/metrics", "/v1/models", "/docsx", "/v1/files"):
            assert server.refused("GET", path)[0] == 401
        for path in ("/", "/health", "/health/live", "/health/ready", "/docs"):
            assert server.ask("GET", path)[0] == 200
        schema = server.ask("GET", "/openapi.json")[2]
        assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        assert schema["paths"]["/v1/images/generations"]["post"]["security"] == [{"key": []}]
        key, body = {"Authorization": "Bearer sesame"}, {"prompt": "a"}
        for origin, status in (("https://evil.example", 403), ("https://friend.example", 200)):
            answered = server.ask("POST", "/v1/images/generations", body, **key, Origin=origin)
            assert answered[0] == status
        assert answered[1]["access-control-allow-origin"] == "https://friend.example"
        assert "sesame" not in repr(settings)


def test_what_does_not_fit_is_refused_before_it_waits():
    async def refusal(work: Work) -> str | None:
        return "this takes 9 GiB, and 8 GiB were free" if work.height == 64 else None

    with served(Ranks(), refusal=refusal) as server:
        body = {"prompt": "a", "size": "64x64"}
        status, headers, answer = server.ask("POST", "/v1/images/generations", body)
        assert (status, headers["x-should-retry"]) == (507, "false")
        assert answer["error"]["code"] == "insufficient_memory" and "9 GiB" in answer["error"]["message"]
        assert server.ranks.works == []
        assert server.ask("POST", "/v1/images/generations", {**body, "size": "32x32"})[0] == 200


def test_who_goes_away_or_deletes_cancels():
    body = {"prompt": "a", "num_inference_steps": 1000}
    with served(Ranks(step_s=0.005)) as server:
        for stream in (False, True):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
            id = f"gone-{stream}"
            headers = {"Content-Type": "application/json", "X-Request-Id": id}
            connection.request("POST", "/v1/images/generations", json.dumps({**body, "stream": stream}), headers)
            _until(lambda id=id: any(work.id == id for work in server.ranks.works))
            connection.close()
            _until(lambda id=id: id in server.ranks.cancelled)
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.ask("POST", "/v1/images/generations", body, X_Request_Id="mine"))
        )
        asking.start()
        _until(lambda: any(work.id == "mine" for work in server.ranks.works))
        assert server.ask("DELETE", "/v1/requests/mine")[0] == 200
        asking.join(5)
        status, headers, answer = answers[0]
        assert (status, headers["x-request-id"], answer["error"]["code"]) == (499, "mine", "cancelled")
        assert server.refused("DELETE", "/v1/requests/mine")[0] == 404
        assert not server.engine.status()["running"]


def test_a_full_queue_a_deadline_and_an_end():
    with served(Ranks(step_s=0.005, joins=False), max_queue=1) as server:
        long = {"prompt": "a", "num_inference_steps": 1000}
        path = "/v1/images/generations"
        asking = [
            threading.Thread(target=server.ask, args=("POST", path, long), kwargs={"X_Request_Id": id}) for id in "ab"
        ]
        for thread, queued in zip(asking, (0, 1), strict=True):
            thread.start()
            _until(lambda queued=queued: server.ranks.works and server.engine.status()["queued"] == queued)
        status, headers, _ = server.ask("POST", path, long)
        assert status == 429 and int(headers["retry-after"]) >= 1
        for id in "ab":
            server.ask("DELETE", f"/v1/requests/{id}")
        for thread in asking:
            thread.join(5)
        status, error = server.refused("POST", path, {**long, "deadline": 0.05})
        assert (status, error["code"]) == (504, "deadline_passed")
        text = server.ask("GET", "/metrics")[2].decode()
        assert 'xdit_failures_total{kind="cancelled"} 2.0' in text and 'xdit_failures_total{kind="late"} 1.0' in text
        assert f'xdit_http_responses_total{{route="{path}",status="429"}} 1.0' in text
        assert 'xdit_rank_resident_bytes{rank="0"} 1000.0' in text
        server.engine.draining = True
        assert server.refused("POST", path, long)[0] == 503
        status, _, health = server.ask("GET", "/health/ready")
        assert (status, health["status"], server.ask("GET", "/health/live")[0]) == (503, "draining", 200)


def test_videos_are_jobs():
    facts = {"makes": "videos", "takes": [*TAKES, "num_frames"]}
    with served(Ranks(step_s=0.005, **facts)) as server:
        videos = server.client().videos
        job = videos.create(
            prompt="a", seconds="1", size="32x16", input_reference=("a.png", _picture()), extra_body={"fps": 5}
        )
        assert (job.status, job.size, job.object) == ("queued", "32x16", "video")
        done = videos.poll(job.id, poll_interval_ms=20)
        assert (done.status, done.progress, done.seconds) == ("completed", 100, "1")
        assert (server.ranks.works[0].num_frames, list(server.ranks.works[0].pictures)) == (5, ["image"])
        assert videos.download_content(job.id).read()[4:8] == b"ftyp"
        first = videos.download_content(job.id, variant="thumbnail").read()
        assert Image.open(io.BytesIO(first)).size == (32, 16)
        assert [each.id for each in videos.list()] == [job.id]
        assert videos.delete(job.id).deleted
        with pytest.raises(openai.NotFoundError):
            videos.retrieve(job.id)
        long = videos.create(prompt="a", extra_body={"num_inference_steps": 1000})
        with pytest.raises(openai.NotFoundError, match="is queued|is in_progress"):
            videos.download_content(long.id)
        _until(lambda: len(server.ranks.works) == 2)
        videos.delete(long.id)
        _until(lambda: server.ranks.cancelled == [long.id])
        broken = videos.poll(videos.create(prompt="break").id, poll_interval_ms=20)
        assert (broken.status, broken.error.message) == ("failed", "so it is")


def test_kept_files_are_bounded_by_count_bytes_and_time(monkeypatch: pytest.MonkeyPatch):
    results = Results(Keep(count=2, bytes=10, seconds=5))
    names = [results.put(b"abc", "image/png", "png") for _ in range(3)]
    assert [results.get(name) is not None for name in names] == [False, True, True]
    assert results.put(b"a" * 11, "image/png", "png") is None
    large = results.put(b"a" * 9, "image/png", "png")
    assert results.get(names[2]) is None and results.get(large).data == b"a" * 9
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 6)
    assert results.get(large) is None
    assert len(set(names)) == 3 and all(len(name) > 40 for name in names)


def test_the_page_needs_nothing_from_elsewhere(images: Server):
    status, headers, page = images.ask("GET", "/")
    text = page.decode()
    assert status == 200 and not re.findall(r"https?://|//cdn|@import|\bstyle=|\son\w+=\"", text)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy
    labelled = set(re.findall(r'<label for="(\w+)"', text))
    assert set(re.findall(r'<(?:input|textarea) id="(\w+)"', text)) - labelled == {"grow"}


def test_the_documentation_needs_nothing_from_elsewhere(images: Server):
    status, headers, page = images.ask("GET", "/docs")
    assert status == 200 and "default-src 'none'" in headers["content-security-policy"]
    assert "//" not in page.decode()
    for path in re.findall(r'(?:href|src)="([^"]+)"', page.decode()):
        status, headers, data = images.ask("GET", f"/{path}")
        assert status == 200 and len(data) > 500 and "html" not in headers["content-type"]
    schema = images.ask("GET", "/openapi.json")[2]
    assert "securitySchemes" not in schema.get("components", {})


def test_every_metric_says_what_it_is(images: Server):
    images.client().images.generate(prompt="a", extra_body={"num_inference_steps": 3})
    text = images.ask("GET", "/metrics")[2].decode()
    found = {each.name: each for each in text_string_to_metric_families(text)}
    assert {name: found[name].type for name in METRICS} == METRICS
    assert all(len(each.documentation) > 10 for each in found.values())
    values = {each.name: each.samples[0].value for each in found.values()}
    assert values["xdit_collective_bytes"] == 64 and values["xdit_rank_device_bytes"] == 500
    assert values["xdit_steps"] >= 3 and values["xdit_steps_per_second"] > 0


def test_ranks_are_seen_before_the_first_request():
    with served(Ranks()) as server:
        shown = server.ask("GET", "/v1/models")[2]["data"][0]
        assert (shown["size"], shown["steps"], shown["arguments"]) == ([16, 24], 4, ["image", "mask_image", *KINDS])
        ranks = server.ask("GET", "/v1/status")[2]["ranks"]
        assert ranks == [{"rank": 0, "resident": 900, "device_memory": 0, "sent": 0}]


def test_the_front_imports_no_pytorch():
    code = "import sys, xdit_compile.serving.http.app; print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
