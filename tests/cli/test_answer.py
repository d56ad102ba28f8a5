"""Answers for programs, what files tell of themselves, and what is said of input that is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from commands import TINY_PIPELINE, clean_environment, files, run
from PIL import Image
from safetensors import safe_open

from xdit_compile import Plan
from xdit_compile.cli.main import main
from xdit_compile.cli.options.answer import answering, plain
from xdit_compile.cli.options.expected import expected_difference
from xdit_compile.cli.options.request import DEMO_PIPELINE
from xdit_compile.cli.running.lost_input import listening
from xdit_compile.cli.running.output import Latents, Pixels
from xdit_compile.cli.running.saving import write

STEP = f"--model {TINY_PIPELINE} --backend eager --no_cache --height 64 --width 64 --num_inference_steps 1".split()
FACTS = {"prompt": 'a "red" Würfel\n—', "seed": 7, "num_inference_steps": 2, "plan": "ulysses 2", "Software": "xdit"}


def _picture(*shape: int) -> Pixels:
    return Pixels(np.linspace(0, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape))


def _told(file: Path) -> dict[str, Any]:
    """What a file says of itself, read by other programs' ways."""
    if file.suffix == ".safetensors":
        with safe_open(file, "numpy") as opened:
            return {name: text for name, text in (opened.metadata() or {}).items() if name != "images"}
    if file.suffix == ".mp4":
        ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
        said = subprocess.run([ffmpeg, "-loglevel", "error", "-i", file, "-f", "ffmetadata", "-"], capture_output=True)
        lines = [line for line in said.stdout.decode().splitlines() if line.startswith("comment=")]
        return json.loads(lines[0].removeprefix("comment=").replace("\\\\", "\\")) if lines else {}
    image = Image.open(file)
    if file.suffix == ".png":
        return dict(image.text)
    text = image.info.get("comment", b"").decode() if file.suffix == ".gif" else image.getexif().get(0x010E, "")
    return json.loads(text) if text else {}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".mp4", ".safetensors"])
def test_a_file_tells_what_it_was_made_with(tmp_path: Path, suffix: str):
    made: Pixels | Latents = _picture(1, 4, 16, 16, 3) if suffix in (".gif", ".mp4") else _picture(1, 16, 16, 3)
    made = Latents(np.ones((1, 4), dtype=np.float32)) if suffix == ".safetensors" else made
    (file,) = write(made, str(tmp_path / f"a{suffix}"), 8, [FACTS])
    told = _told(file)
    assert {name: str(fact) for name, fact in told.items()} == {name: str(fact) for name, fact in FACTS.items()}
    (bare,) = write(made, str(tmp_path / f"b{suffix}"), 8)
    assert _told(bare) == {}


def test_generate_answers_with_one_document_and_says_what_is_lost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    flags = ["--prompt", "a red circle", "--prompt", f"a fox {'in snow ' * 300}", "--json", "--seed", "5"]
    idle = "--fps 9 --warmup_steps 3 --num_frames 4 --negative_prompt blue --guidance_scale 1".split()
    assert main(["generate", *STEP, *flags, *idle]) == 0
    out, err = capfd.readouterr()
    answer = json.loads(out)
    assert [(each["path"], each["seed"]) for each in answer["files"]] == [("out.png", 5), ("out-1.png", 6)]
    assert answer["files"][0]["prompt"] == "a red circle"
    assert answer["plan"]["ulysses"] == 1 and answer["num_inference_steps"] == 1 and answer["shape"] == [2, 64, 64, 3]
    assert Image.open("out.png").text | {"seed": "5", "prompt": "a red circle"} == Image.open("out.png").text
    assert Image.open("out-1.png").text["seed"] == "6"
    assert "wrote out.png: seed 5, 'a red circle'" in err
    for line in (
        "--fps has no effect: this pipeline makes images",
        "--warmup_steps has no effect: only --pipefusion_parallel_degree or --distrifusion_parallel_degree takes",
        "--num_frames has no effect: this pipeline does not take it",
        "--prompt 2 is cut at 32 tokens by tokenizer: 'snow in snow",
        "--prompt 2 is cut at 256 tokens by tokenizer_3: 'in snow in snow",
        "--prompt 2: tokenizer knows 'fox', 'snow' letter by letter only",
        "--negative_prompt had no effect: the pipeline ran without guidance",
    ):
        assert err.count(f"xdit-compile: warning: {line}") == 1, err
    assert any("is cut at 32 tokens by tokenizer" in line for line in answer["warnings"])


@pytest.mark.slow
def test_no_metadata_is_written_where_none_is_wanted(tmp_path: Path):
    done = run("generate", *STEP, "--no_metadata", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out.png").text == {}
    assert done.stdout.count("wrote out.png: seed 42, 'a large red star") == 1


@pytest.mark.slow
def test_two_processes_answer_once_and_a_stale_method_says_what_to_expect(tmp_path: Path):
    flags = [*STEP[:-1], "3", "--nproc", "2", "--pipefusion_parallel_degree", "2", "--compare", "--json"]
    done = run("generate", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["processes"] == 2 and answer["plan"]["pipefusion"] == 2
    assert answer["compare"]["expected"] == expected_difference(Plan(pipefusion=2))
    assert f"{answer['compare']['expected']}; this one has {answer['compare']['psnr']:.1f} dB" in done.stderr


@pytest.mark.slow
def test_explain_answers_with_one_document(tmp_path: Path):
    done = run("explain", *STEP[:-2], "--ulysses_degree", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["report"]["ranks"] == 2
    assert any(each["bytes"] > 0 for each in answer["report"]["collectives"])
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_evaluate_answers_with_its_report(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("a red circle\n" + "in snow " * 300)
    done = run("evaluate", *STEP, "--prompts", "mine.txt", "--images", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer.pop("files") == ["evaluation/report.json", "evaluation/sheet.png"]
    assert answer == json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert "--prompts is cut at 32 tokens by tokenizer" in done.stderr
    told = Image.open(tmp_path / "evaluation" / "images" / "0000-plan.png").text
    assert (told["prompt"], told["seed"]) == ("a red circle", "42")


def test_what_else_is_printed_goes_to_stderr(capfd: pytest.CaptureFixture[str]):
    with answering(True) as answer:
        print("a library speaks")
        subprocess.run([sys.executable, "-c", "print('a program speaks')"])
        answer["value"] = plain({"a": float("nan"), "b": (1, Path("x")), 3: None})
    out, err = capfd.readouterr()
    assert json.loads(out) == {"value": {"a": None, "b": [1, "x"], "3": None}}
    assert "a library speaks" in err and "a program speaks" in err


def test_words_that_a_tokenizer_cuts_or_does_not_know_are_told():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_PIPELINE / "tokenizer")
    lines: list[str] = []
    texts = [("--prompt", "A red Lighthouse near 日本 and a blue square")]
    with listening(SimpleNamespace(components={"words": tokenizer, "none": None}), texts, lines.append):
        for _ in range(2):
            cut = tokenizer([texts[0][1].lower()], truncation=True, max_length=8)["input_ids"]
        tokenizer("a text of somebody else's: lighthouse")
        whole = tokenizer("a red lighthouse near 日本 and a blue square")["input_ids"]
    assert len(cut[0]) == 8 and len(whole) > 20
    assert type(tokenizer).__call__.__qualname__.startswith("PreTrainedTokenizerBase")
    assert lines[0].startswith("--prompt is cut at 8 tokens by words: '") and lines[0].endswith("tokens)")
    assert "a blue square' is lost" in lines[0]
    assert lines[1] == "--prompt: words does not know 'near', '日本'"
    assert lines[2].startswith("--prompt: words knows 'lighthouse'") and lines[2].endswith(" letter by letter only")
    assert len(lines) == 3


def test_the_versions_are_told_without_importing_what_they_are_of():
    code = "import sys; from xdit_compile.cli.main import main; main(['--version']); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    import diffusers
    import torch

    *said, imported = done.stdout.splitlines()
    assert f"torch {torch.__version__}, diffusers {diffusers.__version__}" in said[1]
    assert said[0].endswith(", version 0.1.0") and said[2].startswith("device: ") and "eager" in said[3]
    assert imported == "False"
