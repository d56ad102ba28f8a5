"""The server as it is started: real ranks, real HTTP, the embedded pipeline."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from benchmarks import serving_client
from xdit_compile.cli.options.request import DEMO_PIPELINE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
READY_S = 300
STEPS = 6


class Server(serving_client.Server):
    """One that runs; a request says less, and nothing may take as long."""

    ready_s, get_s, answer_s = READY_S, 10, 300

    def send(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        answer = self.ask(**_filled(fields))
        return answer.status, answer.body

    def picture(self, **fields: Any) -> np.ndarray:
        return super().picture(**_filled(fields))


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "a red circle", "num_inference_steps": STEPS, **fields}


def serving(folder: Path, *flags: str) -> AbstractContextManager[Server]:
    environment = {"OMP_NUM_THREADS": "1", "XDIT_COMPILE_CACHE": str(folder / "cache")}
    return serving_client.serving(("--backend", "eager", *flags), folder / "log", Server, environment)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve"), "--ulysses_degree", "2", "--max_batch", "3") as one:
        yield one


def alone(prompt: str, seed: int, steps: int) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(str(DEMO_PIPELINE))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np").images[0]
    return (made * 255).round().astype(int)


def test_pictures_are_those_of_the_pipeline_whoever_asks_beside(server: Server) -> None:
    asked = [("a red circle", 1, STEPS), ("a blue square", 2, STEPS + 3), ("a green star", 3, STEPS)]

    def send(index: int) -> np.ndarray:
        prompt, seed, steps = asked[index]
        time.sleep(0.3 * index)
        return server.picture(prompt=prompt, seed=seed, num_inference_steps=steps)

    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            made = list(pool.map(send, range(3)))
        for picture, request in zip(made, asked, strict=True):
            assert np.abs(picture - alone(*request)).max() <= 1
    metrics = server.get("/metrics")[1]
    sizes = dict(re.findall(r'xdit_batch_size_bucket\{le="([\d.]+)"\} ([\d.]+)', metrics))
    assert float(sizes["1.0"]) < float(sizes["3.0"]), "no calls joined"


def test_a_cancelled_request_ends_within_two_steps_and_leaves_nothing(server: Server) -> None:
    before = server.picture(seed=5)
    answers: list[tuple[int, Any]] = []
    ask = threading.Thread(target=lambda: answers.append(server.send(seed=6, num_inference_steps=500, id="req-long")))
    ask.start()
    limit = time.monotonic() + 60
    while not (running := json.loads(server.get("/v1/status")[1])["running"]) or running[0]["step"] < 3:
        assert time.monotonic() < limit
        time.sleep(0.02)
    step = json.loads(server.get("/v1/status")[1])["running"][0]["step"]
    request = urllib.request.Request(f"{server.address}/v1/requests/req-long", method="DELETE")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
    ask.join(30)
    assert answers and answers[0][0] == 499
    assert step < 400
    assert np.array_equal(server.picture(seed=5), before)


def test_a_wrong_argument_fails_alone(server: Server) -> None:
    status, answer = server.send(height=33, width=33)
    assert status == 400 and answer["error"]["message"]
    assert server.send(seed=5)[0] == 200


def test_health_answers_at_once_while_a_picture_is_made(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(server.send, seed=7, num_inference_steps=30)
        while not made.done():
            assert server.get("/health/live")[0] == 200
    assert made.result()[0] == 200


def test_the_snippet_of_the_docs(server: Server) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(block.replace("http://127.0.0.1:8000", server.address), namespace)
    assert namespace["answer"].data[0].b64_json


def test_a_killed_rank_fails_its_requests_and_others_follow(tmp_path: Path) -> None:
    with serving(tmp_path, "--ulysses_degree", "2", "--max_batch", "2") as server:
        first = server.picture(seed=1)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(server.send, seed=seed, num_inference_steps=60) for seed in range(3)]
            limit = time.monotonic() + 60
            while len(json.loads(server.get("/v1/status")[1])["running"]) < 2:
                assert time.monotonic() < limit
                time.sleep(0.05)
            killed = server.ranks()
            killed[1].kill()
            codes = sorted(each.result()[0] for each in asked)
        assert codes == [200, 500, 500]
        assert not set(server.ranks()) & set(killed)
        assert np.array_equal(server.picture(seed=1), first)


def test_retried_requests_survive_and_sigterm_drains(tmp_path: Path) -> None:
    with serving(tmp_path, "--ulysses_degree", "2", "--retry") as server:
        expected = server.picture(seed=2, num_inference_steps=40)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.picture, seed=2, num_inference_steps=40)
            while not json.loads(server.get("/v1/status")[1])["running"]:
                time.sleep(0.02)
            server.ranks()[0].kill()
            assert np.abs(asked.result() - expected).max() <= 1
            asked = pool.submit(server.picture, seed=2, num_inference_steps=40)
            while not json.loads(server.get("/v1/status")[1])["running"]:
                time.sleep(0.02)
            ranks = server.ranks()
            server.process.send_signal(signal.SIGTERM)
            assert np.abs(asked.result() - expected).max() <= 1
        assert server.process.wait(30) == 0
        assert not any(each.is_running() for each in ranks)


def test_every_request_is_answered_once_and_rightly_whatever_happens(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/serving_soak.py"), "--requests", "40", "--kills", "1"]
    options = ["--backend", "eager", "--cache", str(tmp_path), "--recovery_s", str(READY_S)]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=2 * READY_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "40 requests in" in ran.stdout
