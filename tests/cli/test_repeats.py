"""Calls of a pipeline: several times, with some prompts at once, from pictures, traced."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import TINY_PIPELINE, files, run
from PIL import Image

from xdit_compile.cli.inputs import given
from xdit_compile.cli.main import main
from xdit_compile.cli.options.request import Request
from xdit_compile.cli.running import repeats
from xdit_compile.cli.running.output import Pixels
from xdit_compile.distributed.world import World
from xdit_compile.errors import XditCompileError

QUICK = ["--model", str(TINY_PIPELINE), *"--backend eager --num_inference_steps 2 --height 64 --width 64".split()]


@pytest.mark.slow
def test_runs_are_timed_compared_and_traced_and_lie_in_a_folder(tmp_path: Path):
    arguments = (
        "--prompt a --prompt b --prompt c --batch_size 2 --num_iterations 2 --warmup_calls 1 --determinism_check "
        "--profile".split()
    )
    done = run("generate", *QUICK, *arguments, "--output_directory", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^run (\d) of 2: [\d.]+ s$", done.stdout, re.MULTILINE) == ["1", "2"]
    assert re.search(r"^median [\d.]+ s of 2 runs, [\d.]+ to [\d.]+ s$", done.stdout, re.MULTILINE)
    assert "the bytes of 2 runs are the same on every rank" in done.stdout
    assert files(tmp_path) == {"made"}
    assert files(tmp_path / "made") == {"out.png", "out-1.png", "out-2.png", "profile.json"}
    events = json.loads((tmp_path / "made" / "profile.json").read_text())["traceEvents"]
    assert any("addmm" in str(event.get("name")) for event in events)


@pytest.mark.slow
def test_pictures_of_batches_are_those_of_one_call(tmp_path: Path):
    prompts = ["--prompt", "a red circle", "a blue star", "a green square"]
    for name, size in {"whole": [], "parts": ["--batch_size", "2"]}.items():
        done = run("generate", *QUICK, *prompts, *size, "--output", f"{name}.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for end in ("", "-1", "-2"):
        one, other = (np.asarray(Image.open(tmp_path / f"{name}{end}.png")).astype(int) for name in ("whole", "parts"))
        assert np.abs(one - other).max() <= 1


@pytest.mark.slow
def test_two_processes_agree_on_the_same_bytes_and_save_memory(tmp_path: Path):
    more = "--nproc 2 --ulysses_degree 2 --determinism_check --enable_slicing --enable_tiling --profile step.json"
    done = run("generate", *QUICK, *more.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the bytes of 2 runs are the same on every rank") == 1
    assert files(tmp_path) == {"out.png", "step.json"}


@pytest.mark.slow
def test_a_pipeline_without_pictures_says_that_it_takes_none(tmp_path: Path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    done = run("generate", *QUICK, "--input_images", "a.png", "--resize_input_images", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--image has no effect: this pipeline does not take it" in done.stderr


@pytest.mark.slow
def test_a_pipeline_of_pictures_starts_from_the_one_given(tmp_path: Path):
    shutil.copytree(TINY_PIPELINE, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"))
    for colour in ("red", "blue"):
        Image.new("RGB", (50, 40), colour).save(tmp_path / f"{colour}.png")
        more = [
            "--model",
            "model",
            "--num_inference_steps",
            "5",
            "--input_images",
            f"{colour}.png",
            "--resize_input_images",
            "--output",
        ]
        done = run("generate", *QUICK, *more, f"from_{colour}.png", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, other = (np.asarray(Image.open(tmp_path / f"from_{name}.png")).astype(int) for name in ("red", "blue"))
    assert one.shape == (64, 64, 3) and np.abs(one - other).max() > 8


class Drifting:
    """A pipeline whose results change from call to call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, **arguments: Any) -> Any:
        self.calls += 1
        return type("Result", (), {"images": np.full((1, 8, 8, 3), self.calls / 10, np.float32)})()


def test_other_bytes_are_told_with_the_ranks_and_how_far_they_lie_apart():
    request = Request(determinism_check=True)
    with pytest.raises(XditCompileError, match="run 2 gave other bytes than run 1 on rank 0: .* 1.00e-01 in the float"):
        repeats.repeated(Drifting(), {}, request, World())


def test_a_pipeline_without_steps_cannot_be_traced():
    request = Request(profile="x.json", warmup_calls=2)
    pipe = Drifting()
    with pytest.raises(XditCompileError, match="the pipeline has no scheduler"):
        repeats.repeated(pipe, {}, request, World())
    assert pipe.calls == 3


def test_pictures_are_read_and_cut_to_the_size(tmp_path: Path):
    Image.new("RGBA", (50, 40), "red").save(tmp_path / "a.png")
    name = str(tmp_path / "a.png")
    cut = Request(input_images=(name,), resize_input_images=True, height=32, width=64)
    assert given.pictures(cut, 32, 64)["input_images"].size == (64, 32)
    both = given.pictures(Request(input_images=(name, name)), None, None)["input_images"]
    assert [image.size for image in both] == [(50, 40)] * 2 and both[0].mode == "RGB"
    assert given.pictures(Request(), None, None) == {}


def test_runs_keep_the_first_result():
    made, seconds = repeats.repeated(Drifting(), {}, Request(num_iterations=3), World())
    assert isinstance(made, Pixels) and len(seconds) == 3
    assert made.values.max() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--num_iterations 0", "--num_iterations 0 must be at least 1"),
        ("--warmup_calls -1", "--warmup_calls -1 must be at least 0"),
        ("--batch_size 0", "--batch_size 0 must be at least 1"),
        ("--output_directory a/b", "--output_directory a/b: folder a does not exist; make it first"),
        ("--output_directory file", "--output_directory file is a file; name a folder"),
        ("--profile a/b.json", "--profile a/b.json: folder a does not exist; make it first"),
        ("--enable_tiling --use_parallel_vae", "leave one out, and bound the memory of the parallel one"),
        ("--enable_slicing --use_parallel_vae", "--enable_slicing and --use_parallel_vae both take"),
    ],
)
def test_wrong_repeats_are_refused_before_anything_heavy(
    arguments: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["generate", *arguments.split()]) == 2
    assert expected in capsys.readouterr().err
