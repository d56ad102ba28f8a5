"""Latents that one request makes and another one decodes: the same pixels as in one go, or a clear word."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
import torch
from conformance.cases import CASES
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load, save
from zoo.transformers import Draw

from tests.serving.test_http import Ranks, served
from tests.serving.test_serve import serving
from xdit_compile import Plan, parallelize
from xdit_compile.cli.options.request import DEMO_PIPELINE, PipelineRequest
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.serving.queue.messages import Report, Turn, Work
from xdit_compile.serving.ranks import making as makings
from xdit_compile.serving.ranks.latents import Form, Forms, read
from xdit_compile.serving.ranks.making import Making
from xdit_compile.serving.ranks.rank import Rank

EXACT = ("flux", "qwenimage", "sdxl", "flux_img2img", "flux_control")
"""Packed latents, those with a mean for each channel, a scheduler that scales them, a picture, a control picture."""
MORE = ("sd15_inpaint", "sd3_controlnet", "qwenimage_img2img", "zimage", "kandinsky5_image", "wuerstchen_decoder")
REFUSED = {"flux2": "cannot begin from latents", "sana_sprint": "cannot begin", "ernie": "does not say what latents"}
BODY = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 7, "n": 2, "size": "96x64"}
STEPS = {**BODY, "num_inference_steps": 4, "size": "auto"}


def making(name: str, forms: Forms, pipe: Any = None, **asked: Any) -> Making:
    case = CASES[name]
    arguments = {"num_inference_steps": case.steps, **case.arguments(Draw(10), 0)}
    no_prompt: Any = None
    work = Work("a", no_prompt, seed=5, arguments=arguments, **asked)
    return Making(pipe or case.build(), work, PipelineRequest(), None, True, forms, None)


@pytest.mark.parametrize("name", [*EXACT, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_pixels_are_those_of_one_call(name: str) -> None:
    forms = Forms()
    whole = making(name, forms).run()
    latents = making(name, forms, makes_latents=True).run()
    assert isinstance(latents, bytes)
    for known in (forms, Forms()):
        assert np.array_equal(making(name, known, latents=latents).run(), whole)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused_before_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = Forms()
    refused = making(name, forms, makes_latents=True)
    with pytest.raises(UsageError, match=REFUSED[name]):
        refused.run()
    assert refused.step == 0
    monkeypatch.setattr(makings, "form_of", lambda *_: pytest.fail("it was tried again"))
    with pytest.raises(UsageError, match="ask for the pictures themselves"):
        making(name, forms, latents=b"").run()


def test_a_decoder_that_draws_is_refused() -> None:
    pipe = CASES["sd15"].build()
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, *args, **kwargs: decode(latents + torch.randn(()), *args, **kwargs)
    with pytest.raises(UsageError, match="draws random numbers when it decodes"):
        making("sd15", Forms(), pipe, makes_latents=True).run()


def test_a_pipeline_that_does_not_look_at_latents_is_refused() -> None:
    pipe = CASES["sd15"].build()
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args: prepare(*args[:-1], None)
    with pytest.raises(UsageError, match="gives latents back changed"):
        making("sd15", Forms(), pipe, makes_latents=True).run()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"latents": torch.zeros(1, 4, 8)}, r"shape \[1, 4, 8\], those of this request \[2, 4, 8\]"),
        ({"latents": torch.zeros(2, 4, 8, dtype=torch.int32)}, "are int32, those of this request bfloat16"),
        ({"latents": torch.full((2, 4, 8), float("nan"))}, "not finite"),
        ({"latents": torch.full((2, 4, 8), 1 + 2**-12)}, "are float32 and would be rounded to bfloat16"),
        ({"latents": torch.zeros(2, 4, 8), "more": torch.zeros(1)}, "a file of latents, more"),
        ({}, "a file of nothing"),
    ],
)
def test_files_that_hold_something_else_are_refused(tensors: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read(save(tensors), Form((2, 4, 8), torch.bfloat16))


def test_values_that_fit_are_taken_in_another_dtype() -> None:
    same = read(save({"latents": torch.full((2, 3), 1.5)}), Form((2, 3), torch.bfloat16))
    assert same.dtype == torch.bfloat16 and bool((same == 1.5).all())


class OneRank(Ranks):
    """A real rank in this process: the only one of its gang."""

    def __init__(self) -> None:
        pipe = DiffusionPipeline.from_pretrained(str(DEMO_PIPELINE))
        parallelize(pipe, Plan(backend="eager"))
        self.rank = Rank(pipe, PipelineRequest(plan=Plan(backend="eager")), World(), 0, 2, {})
        super().__init__(**self.rank.facts())

    def exchange(self, turn: Turn) -> list[Report]:
        self.works += turn.start
        return [self.rank._took(turn)]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    ranks = OneRank()
    with served(ranks) as server, httpx2.Client(base_url=f"http://127.0.0.1:{server.port}/v1/images") as one:
        one.timeout = 60
        yield one


def test_latents_and_their_decoding_over_http(client: httpx2.Client) -> None:
    answer = client.post("/generations", json={**BODY, "response_format": "latents"}).json()
    assert set(answer) == {"id", "created", "size", "seconds", "data"}
    (entry,) = answer["data"]
    assert entry["seed"] == 7
    assert load(base64.b64decode(entry["b64_latents"]))["latents"].shape == (2, 8, 8, 12)
    expected = _pixels(client.post("/generations", json=BODY).json())
    assert np.array_equal(_pixels(_decoded(client, BODY, entry).json()), expected)
    last = _last_event(client, "/generations", json={**BODY, "response_format": "latents", "stream": True})
    assert (last["type"], last["index"]) == ("image_generation.completed", 0)
    assert np.array_equal(_pixels(_decoded(client, BODY, last).json()), expected)
    file = base64.b64decode(entry["b64_latents"])
    last = _last_event(client, "/decode", data={**_texts(BODY), "stream": "true"}, files={"latents": file})
    assert (last["type"], last["index"]) == ("image_decode.completed", 1)


def test_what_is_wrong_with_a_file_is_one_line(client: httpx2.Client) -> None:
    entry = {"b64_latents": base64.b64encode(save({"latents": torch.zeros(2, 8, 8, 12)})).decode()}
    for body, words in (
        ({**BODY, "n": 1}, "shape [2, 8, 8, 12], those of this request [1, 8, 8, 12]"),
        ({**BODY, "size": "64x64"}, "shape [2, 8, 8, 12], those of this request [2, 8, 8, 8]"),
        ({**BODY, "response_format": "latents"}, "response_format"),
    ):
        assert _error(_decoded(client, body, entry)).count(words) == 1
    for file, words in ((b"nonsense", "no safetensors file"), (save({"a": torch.zeros(1)}), "other tensors")):
        assert words in _error(client.post("/decode", data=_texts(BODY), files={"latents": file}))
    assert "latents is missing" in _error(client.post("/decode", json=BODY))


def test_a_pipeline_without_latents_and_a_control_picture_alone() -> None:
    """Fields alone: ranks that answer at once do."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    takes = ["prompt", "num_inference_steps", "height", "width", "image", "control_image", "output_type"]
    with (
        served(Ranks(takes=takes)) as server,
        httpx2.Client(base_url=f"http://127.0.0.1:{server.port}/v1/images") as one,
    ):
        error = _error(one.post("/generations", json={"prompt": "a", "response_format": "latents"}))
        assert "takes no latents" in error
        assert "takes no latents" in _error(one.post("/decode", data={"prompt": "a"}, files={"latents": save({})}))
        for names in (["control_image"], ["image", "control_image"]):
            files = {name: picture.getvalue() for name in names}
            assert one.post("/edits", data={"prompt": "a"}, files=files).status_code == 200
            assert set(server.ranks.works[-1].pictures) == set(names)
        assert "image or control_image is missing" in _error(one.post("/edits", json={"prompt": "a"}))
        form = one.get(f"http://127.0.0.1:{server.port}/openapi.json").json()["paths"]["/v1/images/decode"]["post"]
        schema = form["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert {"latents", "prompt"} <= set(schema["required"]) and schema["properties"]["latents"][
            "format"
        ] == "binary"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--ulysses_degree", "2", "--use_parallel_vae", "--max_batch", "3"),
        ("--use_cfg_parallel",),
        ("--pipefusion_parallel_degree", "2", "--num_pipeline_patch", "2"),
        ("--distrifusion_parallel_degree", "2"),
        ("--plan", "latency=ulysses:2", "--plan", "throughput=replicas:2"),
    ],
)
def test_ranks_make_and_decode_them_whoever_asks_beside(flags: tuple[str, ...], tmp_path: Path) -> None:
    with serving(tmp_path, *flags) as server, httpx2.Client(timeout=300) as client:
        client.base_url = f"{server.address}/v1/images"
        bodies = [{**STEPS, "n": 1, "seed": seed} for seed in range(3)]
        whole = [_pixels(client.post("/generations", json=body).json()) for body in bodies]

        def both(body: dict[str, Any]) -> np.ndarray:
            made = client.post("/generations", json={**body, "response_format": "latents"}).json()
            return _pixels(_decoded(client, body, made["data"][0]).json())

        for _ in range(2):
            with ThreadPoolExecutor(3) as pool:
                made = list(pool.map(both, bodies))
            assert max(np.abs(one.astype(int) - other).max() for one, other in zip(made, whole, strict=True)) <= 1
            assert np.array_equal(both(bodies[0]), whole[0])
        assert json.loads(server.get("/v1/status")[1])["restarts"] == 0


@pytest.mark.slow
def test_a_server_ends_where_another_program_takes_the_place_of_what_started_it(tmp_path: Path) -> None:
    flags = ["--with_parent", "--port", "0", "--backend", "eager", "--nproc", "2", "--ulysses_degree", "2"]
    code = (
        "import os, subprocess, sys\n"
        f"command = [sys.executable, '-m', 'xdit_compile', 'serve', *{flags}]\n"
        "process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)\n"
        "print(process.pid, process.stdout.readline(), flush=True)\n"
        "sys.stdin.readline()\n"
        "os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDIT_COMPILE_CACHE": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True, env=environment)
    assert parent.stdin is not None and parent.stdout is not None
    number, line = parent.stdout.readline().split(" ", 1)
    front = psutil.Process(int(number))
    address = line.partition(" at ")[2].partition(";")[0]
    try:
        with httpx2.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(1) as pool:
            limit = time.monotonic() + 300
            while client.get("/health/ready").status_code != 200:
                assert time.monotonic() < limit
                time.sleep(0.2)
            every = [front, *front.children(recursive=True)]
            assert len(every) >= 3
            asked = {**STEPS, "num_inference_steps": 900}
            pool.submit(client.post, "/v1/images/generations", json=asked)
            while not client.get("/v1/status").json()["running"]:
                time.sleep(0.05)
            parent.stdin.write("\n")
            parent.stdin.flush()
            gone, left = psutil.wait_procs([each for each in every if each.is_running()], 5)
            assert not [each for each in left if each.status() != psutil.STATUS_ZOMBIE]
            assert parent.poll() is None
    finally:
        parent.kill()
        parent.wait()
        if front.is_running():
            front.kill()


def _texts(body: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in body.items()}


def _decoded(client: httpx2.Client, body: dict[str, Any], entry: dict[str, Any]) -> httpx2.Response:
    return client.post("/decode", data=_texts(body), files={"latents": base64.b64decode(entry["b64_latents"])})


def _pixels(answer: dict[str, Any]) -> np.ndarray:
    files = [base64.b64decode(entry["b64_json"]) for entry in answer["data"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def _error(answer: httpx2.Response) -> str:
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert "\n" not in message
    return message


def _last_event(client: httpx2.Client, path: str, **body: Any) -> dict[str, Any]:
    lines = client.post(path, **body).text.splitlines()
    return json.loads([line for line in lines if line.startswith("data: ")][-1].removeprefix("data: "))
