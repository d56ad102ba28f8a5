"""The demo pipeline and how it is trained: what the committed files are, and that a stopped run goes on as it was."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from xdit_compile.cli.options.request import DEMO_PIPELINE, Request
from xdit_compile.evaluation.checker import judge
from xdit_compile.evaluation.scenes import parse, phrase, training_scenes

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "train_demo"
LARGEST = 24_000_000


@pytest.fixture(scope="module")
def pipe():
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.from_pretrained(DEMO_PIPELINE)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def scripts():
    """The folder of the training scripts on the path, as when one of them is run."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def test_the_pipeline_is_what_it_says(pipe) -> None:
    config = pipe.transformer.config
    tokens = (config.sample_size // config.patch_size) ** 2
    assert (tokens >= 256, config.num_layers >= 8, config.num_attention_heads >= 4) == (True, True, True)
    files = [file for file in DEMO_PIPELINE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= LARGEST
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    parameters = {
        parameter.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder) for parameter in part.parameters()
    }
    assert parameters == {torch.float32}


def test_the_tokenizer_has_a_token_for_every_word_of_every_caption(pipe) -> None:
    rng, scenes = random.Random(0), training_scenes(1)
    for _ in range(300):
        caption = phrase(rng, next(scenes)[1])
        ids = pipe.tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1
        assert pipe.tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("side", [256, pytest.param(512, marks=pytest.mark.slow)])
def test_it_draws_what_the_default_prompt_says(pipe, side: int) -> None:
    (prompt,) = Request().prompt
    images = pipe(
        prompt, height=side, width=side, use_resolution_binning=False, num_inference_steps=20,
        generator=torch.Generator().manual_seed(Request().seed), output_type="np",
    ).images  # fmt: skip
    assert images.shape == (1, side, side, 3)
    assert judge(parse(prompt), images[0]).right
    assert not judge(parse(prompt.replace("red", "blue")), images[0]).right


def train(folder: Path, stops: list[int], seed: int = 3, rounds: int = 2) -> dict[str, torch.Tensor]:
    """The averages after rounds of one or two phases, stopped after each number of steps, and gone on with."""
    from loop import Phase, Training

    for stop in stops:
        torch.manual_seed(seed)
        module = nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        plan = ((Phase(8, 2, 30), Phase(16, 1, 20)), (Phase(8, 2, 10),))[:rounds]
        training = Training("toy", folder, {"toy": module}, [optimizer], plan)

        def loss(phase, step, module=module, stop=stop):
            if step == stop:
                raise KeyboardInterrupt
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(phase.batch, 4, generator=generator)
            return (module(inputs) - inputs[:, :2]).square().mean()

        try:
            training.run(loss, save_every=0)
        except KeyboardInterrupt:
            continue
    return training.averages["toy"]


@pytest.mark.usefixtures("scripts")
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", [-1])
    stopped = train(tmp_path / "stopped", [7, 33, 55, -1])
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    other = train(tmp_path / "other", [-1], seed=4)
    assert not torch.equal(whole["weight"], other["weight"])
    rows = [(folder / "toy.csv").read_text().splitlines() for folder in (tmp_path / "whole", tmp_path / "stopped")]
    steps = [[int(row.split(",")[0]) for row in log] for log in rows]
    assert steps == [[25, 50], [25, 50]]


@pytest.mark.usefixtures("scripts")
def test_a_further_round_can_be_added_to_a_finished_run(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", [-1])
    first = train(tmp_path / "added", [-1], rounds=1)
    assert not torch.equal(first["weight"], whole["weight"])
    added = train(tmp_path / "added", [-1])
    assert all(torch.equal(whole[name], added[name]) for name in whole)


@pytest.mark.slow
def test_the_whole_training_runs_for_a_minute(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "train.py"), "--work", "work", "--pipeline", "pipeline", "--smoke"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "work" / "loss.png").is_file()
    from diffusers import DiffusionPipeline

    made = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    images = made("a red circle", num_inference_steps=2, output_type="np").images
    assert np.isfinite(images).all()
