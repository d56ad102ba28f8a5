"""The scripts of examples/: the same lines but for a model and its arguments, each run by two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from commands import TINY_PIPELINE
from conformance import prompted, texts
from conformance.cases import CASES
from conformance.parts import drawn, like
from conformance.pictures import of_flux
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
OWN = re.compile(
    r"# .*\n|from diffusers import \w+ as Pipeline\n|MODEL = .*\n|PARTS = .*\n|ARGUMENTS = \{\n(?:    .*\n)+\}\n"
)
PICTURE = {"height": 64, "width": 96, "num_inference_steps": 2}
TEXT = {**PICTURE, "max_sequence_length": 16}
PIXART = {**TEXT, "use_resolution_binning": False, "clean_caption": False}
VIDEO = {"height": 64, "width": 80, "num_inference_steps": 2}


def _t5(name: str, cls: type, width: int = 28) -> Any:
    return like(name, cls, text_encoder=texts.t5(width), tokenizer=texts.t5_tokenizer())


def _flux(cls: type, **more: Any) -> Any:
    return of_flux(
        cls, text_encoder=texts.clip_text(22), tokenizer=texts.clip_tokenizer(), text_encoder_2=texts.t5(28),
        tokenizer_2=texts.t5_tokenizer(), **more,
    )  # fmt: skip


def _controlled() -> Any:
    return _flux(diffusers.FluxControlNetPipeline, controlnet=CASES["flux_controlnet"].build().controlnet)


def _hunyuandit() -> Any:
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=5, attention_head_dim=12, in_channels=4, patch_size=2, hidden_size=60, sample_size=16,
        num_layers=6, cross_attention_dim=28, cross_attention_dim_t5=24, pooled_projection_dim=22, text_len=77,
        text_len_t5=256,
    )  # fmt: skip
    return like(
        "hunyuandit", diffusers.HunyuanDiTPipeline, transformer=drawn(model), text_encoder=texts.clip_text(28),
        tokenizer=texts.clip_tokenizer(), text_encoder_2=texts.t5(24), tokenizer_2=texts.t5_tokenizer(),
    )  # fmt: skip


def _mochi() -> Any:
    parts = {**CASES["mochi"].build().components, "text_encoder": texts.t5(32), "tokenizer": texts.t5_tokenizer()}
    return diffusers.MochiPipeline(**parts)


TINY: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "cogvideox": (lambda: _t5("cogvideox", diffusers.CogVideoXPipeline),
                  {**VIDEO, "num_frames": 9, "max_sequence_length": 13}),
    "flux": (lambda: _flux(diffusers.FluxPipeline), TEXT),
    "flux_controlnet": (_controlled, TEXT),
    "flux_img2img": (lambda: _flux(diffusers.FluxImg2ImgPipeline), {**TEXT, "strength": 1.0}),
    "hunyuandit": (_hunyuandit, {**PICTURE, "use_resolution_binning": False}),
    "latte": (lambda: _t5("latte", diffusers.LattePipeline), {**VIDEO, "video_length": 5, "clean_caption": False}),
    "mochi": (_mochi, {**VIDEO, "num_frames": 7, "max_sequence_length": 13}),
    "pixart_alpha": (lambda: _t5("pixart", diffusers.PixArtAlphaPipeline), PIXART),
    "pixart_sigma": (lambda: _t5("pixart", diffusers.PixArtSigmaPipeline), PIXART),
    "sd3": (prompted._sd3, TEXT),
    "sdxl": (prompted._sdxl, PICTURE),
    "wan": (lambda: _t5("wan", diffusers.WanPipeline), {**VIDEO, "num_frames": 5, "max_sequence_length": 16}),
}  # fmt: skip
"""A small pipeline of each script's class, and what is asked of it."""


def test_scripts_differ_in_model_and_arguments_alone() -> None:
    assert {path.stem for path in SCRIPTS} == set(TINY)
    rest = {OWN.sub("", path.read_text()).replace("load_image, ", "") for path in SCRIPTS}
    assert len(rest) == 1 and len(rest.pop().split("\n\nif ")[1].splitlines()) <= 20
    pictures = {path.stem for path in SCRIPTS if "load_image(" in path.read_text()}
    assert pictures == {"flux_controlnet", "flux_img2img"}


def _small(script: Path, folder: Path, picture: Path, arguments: dict[str, Any]) -> str:
    """A script with a small model and small arguments in the place of its own; what it asks for else stays."""
    text = script.read_text()
    text = re.sub(r"MODEL = .*", f"MODEL = {str(folder)!r}", text)
    text = re.sub(r"PARTS = .*", "PARTS = {}", text)
    text = re.sub(r"load_image\([^)]*\)", f"load_image({str(picture)!r})", text)
    text = text.replace('"WORLD_SIZE", 1))', '"WORLD_SIZE", 1)), backend="eager", cache=None')
    return text.replace("\nif not is_main_process", f"\nARGUMENTS |= {arguments!r}\nif not is_main_process", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    make, arguments = TINY[name]
    make().save_pretrained(tmp_path / "model")
    picture = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(picture)
    written = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        script = folder / f"{name}.py"
        script.write_text(_small(EXAMPLES / f"{name}.py", tmp_path / "model", picture, arguments))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            script,
        ]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        written += [path for path in folder.iterdir() if path != script]
    assert len(written) == 2 and written[0].name == written[1].name
    if written[0].suffix == ".png":
        assert Image.open(written[1]).size == (arguments["width"], arguments["height"])
        assert _apart(*written) <= 1


def _apart(one: Path, other: Path) -> int:
    from PIL import ImageChops

    extremes: Any = ImageChops.difference(Image.open(one), Image.open(other)).getextrema()
    return max(high for _, high in extremes)


@pytest.mark.slow
def test_run_sh_takes_the_variables_of_xdit(tmp_path: Path) -> None:
    variables = {
        "MODEL_TYPE": "Sd3", "MODEL_ID": str(TINY_PIPELINE), "N_GPUS": "2", "PARALLEL_ARGS": "--use_cfg_parallel",
        "TASK_ARGS": "--height 64 --width 64 --max_sequence_length 16", "INFERENCE_STEP": "1",
        "COMPILE_FLAG": "--backend eager --no_cache", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    script = str(EXAMPLES / "run.sh")
    done = subprocess.run(
        [script], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["results/Sd3.png"]
    wrong = subprocess.run([script], env=os.environ | {"MODEL_TYPE": "none"}, capture_output=True, text=True)
    assert wrong.returncode == 2 and "choose one of" in wrong.stderr
