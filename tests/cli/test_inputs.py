"""What a pipeline is given besides prompts, sizes and seeds, by the real command and the real classes."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import diffusers
import numpy as np
import pytest
from commands import TINY_PIPELINE, one_error, run
from conformance import texts
from conformance.cases import CASES
from conformance.parts import like
from conformance.pictures import of_flux
from PIL import Image

from xdit_compile.cli.inputs import given
from xdit_compile.cli.inputs.annotations import Argument
from xdit_compile.cli.inputs.asked import texts_of
from xdit_compile.cli.main import main
from xdit_compile.cli.options.request import Request
from xdit_compile.errors import UsageError, XditCompileError

SMALL = "--height 64 --width 96 --num_inference_steps 4 --backend eager --no_cache --overwrite".split()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for colour in ("red", "blue", "white"):
        Image.new("RGB", (96, 64), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--image none.png", "--image none.png is no file; give pictures that are on this machine"),
        ("--mask_image white.png", "give the picture with --image"),
        ("--image red.png --strength 2", "--strength 2.0 must lie between 0, the picture as it is, and 1"),
        ("--set cfg", "--set cfg must be NAME=VALUE, such as true_cfg_scale=4.0"),
        ("--set height=72", "--set height: give --height, which is checked"),
        ("--set a=1 --set a=2", "--set gives a twice; leave one out"),
        ("--prompt_file none.txt", "--prompt_file none.txt cannot be read: No such file or directory\n"),
        ("--prompt_file red.png", "--prompt_file red.png is no text file; write prompts one a line, in UTF-8"),
        ("--prompt_file .", "--prompt_file . cannot be read: Is a directory\n"),
        ("--prompt ''", "--prompt is empty; say what to show"),
        ("--prompt 'a red circle' ' '", "--prompt is empty; say what to show"),
        (
            "--scheduler Foo",
            "--scheduler Foo: the installed diffusers has no scheduler of that name; give a class",
        ),
        ("--scheduler DDIMSchedular", "no scheduler of that name; did you mean DDIMScheduler?"),
        ("--set eta=abc", "--set eta=abc: eta takes a number\n"),
        ("--set sigmas=0.5", "--set sigmas=0.5: sigmas takes a list such as [0.5, 1.0]\n"),
        ("--set clean_caption=1", "--set clean_caption=1: clean_caption takes true or false\n"),
        ("--set latents=3", "latents takes torch.Tensor, which no text stands for; give it in Python"),
        ("--set heigth=64", "--set heigth: this pipeline takes no argument of that name; did you mean height?"),
        ("--resize_input_images", "--resize_input_images needs a picture"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_runs(
    flags: str, words: str, pictures: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    assert main(["generate", *shlex.split(flags)]) == 2
    assert words in capsys.readouterr().err


def test_assignments_are_json_or_text() -> None:
    texts = texts_of(("a=1.5", "b=[1, 2]", "c=some words", "d=True", 'e="7"', "f=x=y", "g=None"))
    told = {name: Argument(None).value(text) for name, text in texts.items()}
    assert told == {"a": 1.5, "b": [1, 2], "c": "some words", "d": True, "e": "7", "f": "x=y", "g": None}


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        ("float | None", "2", 2),
        ("Optional[float]", "none", "takes a number or null"),
        ("str | list[str]", "5", "5"),
        ("str | list[str]", '["a", "b"]', ["a", "b"]),
        ("tuple[int, int]", "[64, 96]", (64, 96)),
        ("Tuple[int, int]", "64,96", "takes a list such as [1, 2]"),
        ("dict[str, Any] | None", '{"scale": 0.5}', {"scale": 0.5}),
        ("Union[int, List[int]]", "2.5", "takes a whole number or a list such as [1, 2]"),
        ("int", "true", "takes a whole number"),
        ("float", "NaN", "takes a number"),
        (
            "Callable[[int], None] | None",
            "f",
            "takes Callable[[int], None], which no text stands for; give it in Python",
        ),
        ("OfAnotherModule | None", "3", 3),
    ],
)
def test_an_argument_takes_what_its_annotation_says(annotation: str, text: str, value: object) -> None:
    argument = Argument(ast.parse(annotation, mode="eval").body)
    if isinstance(value, str) and value.startswith("takes "):
        with pytest.raises(ValueError, match=f"^{re.escape(value)}$"):
            argument.value(text)
        return
    assert argument.value(text) == value and type(argument.value(text)) is type(value)


def test_an_error_of_the_pipeline_itself_names_what_was_set() -> None:
    request = Request(assignments=("a=1", "b=2"))
    said = "maybe at what --set a, --set b gave it: TypeError: no such thing"
    with pytest.raises(XditCompileError, match=said), given.naming_assignments(request):
        raise TypeError("no such thing")
    with pytest.raises(TypeError, match="no such thing"), given.naming_assignments(Request()):
        raise TypeError("no such thing")


def test_schedulers_and_arguments_are_those_that_a_pipeline_takes() -> None:
    pipe = like("sd15", diffusers.StableDiffusionPipeline)
    own = pipe.scheduler.config.beta_end
    given.put_scheduler(pipe, "DDIMScheduler")
    assert type(pipe.scheduler) is diffusers.DDIMScheduler and pipe.scheduler.config.beta_end == own
    with pytest.raises(UsageError, match="--scheduler DDIMSchedular does not go .*did you mean .*DDIMScheduler"):
        given.put_scheduler(pipe, "DDIMSchedular")
    assert given.further_arguments(pipe, Request(assignments=("eta=0.5",))) == {"eta": 0.5}
    with pytest.raises(UsageError, match="--set clip_skp: this pipeline takes no argument .*did you mean clip_skip"):
        given.further_arguments(pipe, Request(assignments=("clip_skp=1",)))


@pytest.mark.slow
def test_a_mask_and_a_scheduler_arrive(pictures: Path) -> None:
    text = {"text_encoder": texts.clip_text(), "tokenizer": texts.clip_tokenizer()}
    pipe = like("sd15", diffusers.StableDiffusionInpaintPipeline, **text)
    pipe.save_pretrained(pictures / "model")
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 48, 64))
    mask.save(pictures / "mask.png")
    flags = ["--model", "model", "--nproc", "2", *SMALL]
    made = {}
    for name, more in {
        "plain": [], "again": [], "blue": ["--image", "blue.png"], "whole": ["--mask_image", "white.png"],
        "weak": ["--strength", "0.5"], "ddim": ["--scheduler", "DDIMScheduler"],
    }.items():  # fmt: skip
        inputs = {"--image": "red.png", "--mask_image": "mask.png"} | dict([more] if more else [])
        used = [word for pair in inputs.items() for word in pair]
        done = run("generate", *flags, *used, "--use_cfg_parallel", "--output", f"{name}.png", cwd=pictures)
        assert done.returncode == 0, done.stderr
        made[name] = np.asarray(Image.open(pictures / f"{name}.png")).astype(int)
    assert (made["again"] == made["plain"]).all()
    for name in ("blue", "whole", "weak", "ddim"):
        assert np.abs(made[name] - made["plain"]).max() > 1, name


@pytest.mark.slow
def test_a_control_picture_and_an_argument_arrive(pictures: Path) -> None:
    pipe = of_flux(
        diffusers.FluxControlNetPipeline, controlnet=CASES["flux_controlnet"].build().controlnet,
        text_encoder=texts.clip_text(22), tokenizer=texts.clip_tokenizer(), text_encoder_2=texts.t5(28),
        tokenizer_2=texts.t5_tokenizer(),
    )  # fmt: skip
    pipe.save_pretrained(pictures / "model")
    made = []
    for colour, scale in (("red", 1.0), ("blue", 1.0), ("red", 0.1)):
        flags = ["--set", f"controlnet_conditioning_scale={scale}"]
        flags += ["--model", "model", "--max_sequence_length", "16", "--nproc", "2", *SMALL]
        done = run("generate", *flags, "--control_image", f"{colour}.png", "--output", "out.png", cwd=pictures)
        assert done.returncode == 0, done.stderr
        made.append(np.asarray(Image.open(pictures / "out.png")).astype(int))
    assert np.abs(made[0] - made[1]).max() > 1 and np.abs(made[0] - made[2]).max() > 1
    wrong = run("generate", "--model", "model", "--image", "red.png", *SMALL, cwd=pictures)
    assert wrong.returncode != 0 or "--image has no effect" in wrong.stderr


@pytest.mark.slow
def test_prompts_of_a_file_become_pictures(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    more = ["--model", str(TINY_PIPELINE), "--prompt_file", "prompts.txt", "--batch_size", "1", *SMALL]
    done = run("generate", *more, "--max_sequence_length", "16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.png")} == {"out.png", "out-1.png"}
    assert "a red circle" in done.stdout and "a blue square" in done.stdout
    more = ["--model", str(TINY_PIPELINE), "--set", "heigth=64", *SMALL]
    assert "did you mean height?" in one_error(run("generate", *more, cwd=tmp_path), 2)
