"""The flags that several commands have besides those of a plan: of a model, a picture, and what runs a pipeline.

A new flag is ``option("--name", group=OUTPUT, help=...)`` in one of the functions below, or above a command alone: the
group is where the help shows it. It takes ``type=Choices(names)`` where it is one of a few names. It can then be given
in the environment and in a file as well, and stands in docs/command-line.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from xdit_compile.cli.parsing.choices import Choices, Lines
from xdit_compile.cli.parsing.groups import GENERAL, MODEL, OUTPUT, PARALLEL, PICTURE, flagged, option

from .request import DEVICES, DTYPES, Request


def normalized(name: str) -> str:
    """A flag as it is known: - and _ are the same."""
    return name.replace("-", "_")


def model_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of whatever runs a pipeline."""
    return flagged(
        command,
        option(
            "--model",
            group=MODEL,
            type=click.Path(),
            help="Pipeline folder or Hub id; without it the embedded one, which draws shapes.",
        ),
        option("--negative_prompt", group=PICTURE, help="What not to show."),
        option("--height", group=PICTURE, type=int, help="Pixels.  [default: the pipeline's]"),
        option("--width", group=PICTURE, type=int, help="Pixels.  [default: the pipeline's]"),
        option("--guidance_scale", group=PICTURE, type=float, help="[default: the pipeline's]"),
        option("--max_sequence_length", group=PICTURE, type=int, help="Text tokens.  [default: the pipeline's]"),
        option(
            "--use_resolution_binning/--no_use_resolution_binning",
            group=PICTURE,
            default=None,
            help="Work at the nearest of the pipeline's own sizes and resize.  [default: without a size]",
        ),
        option(
            "--dtype",
            group=MODEL,
            type=Choices(("auto", *dict.fromkeys(DTYPES.values())), DTYPES),
            default="auto",
            help="Of the weights, such as bf16; auto is bfloat16 on CUDA.",
        ),
        option(
            "--download_dir",
            group=MODEL,
            type=click.Path(),
            help="Where models of the Hub are kept.  [default: the Hub's cache]",
        ),
        option(
            "--trust_remote_code", group=MODEL, is_flag=True, help="Run the code that a model of the Hub brings along."
        ),
        option("--quiet", group=GENERAL, is_flag=True, help="Say nothing but warnings, errors and what was made."),
        option("--verbose", group=GENERAL, is_flag=True, help="Say what goes on, a line for each phase."),
        option("--debug", group=GENERAL, is_flag=True, help="Show tracebacks and the libraries' own messages."),
    )


def picture_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What to show, for the commands that look at one picture or video."""
    return flagged(
        command,
        option(
            "--prompt",
            group=PICTURE,
            type=Lines(),
            multiple=True,
            default=Request.prompt,
            help="Give it again for more images.",
        ),
        option("--num_frames", group=PICTURE, type=int, help="Frames of a video.  [default: the pipeline's]"),
    )


def run_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of what runs a pipeline to the end."""
    return flagged(
        command,
        option("--enable_slicing", group=MODEL, is_flag=True, help="Let the autoencoder decode picture by picture."),
        option("--enable_tiling", group=MODEL, is_flag=True, help="Let the autoencoder decode tile by tile."),
        option("--num_inference_steps", group=PICTURE, type=int, help="[default: the pipeline's]"),
        option("--device", group=MODEL, type=Choices(DEVICES), default="auto", help="What runs it."),
        option(
            "--enable_model_cpu_offload",
            group=MODEL,
            is_flag=True,
            help="Keep models on the CPU while they do not run.",
        ),
        option(
            "--enable_sequential_cpu_offload",
            group=MODEL,
            is_flag=True,
            help="Keep layers on the CPU while they do not run.",
        ),
        option(
            "--nproc", group=PARALLEL, type=int, help="Start this many processes here; leave it out under torchrun."
        ),
        option("--force", group=GENERAL, is_flag=True, help="Go on where memory seems too small."),
    )


def repeat_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """How often a pipeline is called, with what at once, and where all of it is written."""
    return flagged(
        command,
        option("--batch_size", group=PICTURE, type=int, help="Prompts in one call.  [default: all]"),
        option("--num_iterations", group=OUTPUT, type=int, default=1, help="Make it this often, and print each time."),
        option("--warmup_calls", group=OUTPUT, type=int, default=0, help="Make it this often before, untimed."),
        option(
            "--determinism_check",
            group=OUTPUT,
            is_flag=True,
            help="Make it twice, and compare the bytes.",
        ),
        option(
            "--output_directory",
            group=OUTPUT,
            type=click.Path(),
            help="Folder for what is written; it is made where it is missing.",
        ),
        option(
            "--profile",
            group=OUTPUT,
            type=click.Path(),
            is_flag=False,
            flag_value="profile.json",
            help="Also run once more and write what rank 0 does in one step, for a viewer of Chrome's traces.  "
            "[without FILE: profile.json]",
        ),
    )


def input_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What goes into a pipeline besides text."""
    picture: dict[str, Any] = {"group": PICTURE, "type": click.Path(), "multiple": True}
    return flagged(
        command,
        option(
            "--image",
            "--input_images",
            "--img_file_path",
            "input_images",
            help="A picture for the pipeline to start from; give it again for more.",
            **picture,
        ),
        option("--mask_image", help="What of it is painted anew: white.", **picture),
        option("--control_image", help="A picture for a control net; give it again for more nets.", **picture),
        option(
            "--resize_input_images", group=PICTURE, is_flag=True, help="Cut and scale these to --height and --width."
        ),
        option("--strength", group=PICTURE, type=float, help="How much of the picture is made anew, 0 to 1."),
        option("--scheduler", group=PICTURE, help="A class of diffusers in the place of the pipeline's own scheduler."),
        option(
            "--set",
            "assignments",
            group=PICTURE,
            type=Lines(),
            multiple=True,
            help="Any other argument of the pipeline's call: NAME=VALUE, the value as JSON or text.",
        ),
        option(
            "--prompt_file", group=PICTURE, type=click.Path(), help="A file of prompts, one a line, besides --prompt."
        ),
    )


def size_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The sizes and numbers of prompts, for the commands that look at several calls of a denoiser."""
    return flagged(
        command,
        option(
            "--prompt",
            group=PICTURE,
            default=Request.prompt[0],
            help="Matters where a model's code reads what it is given.",
        ),
        option("--num_frames", group=PICTURE, type=int, help="Frames of a video.  [default: the pipeline's]"),
        option(
            "--size",
            "sizes",
            group=PICTURE,
            multiple=True,
            help="Such as 1024x1024, height first; give it again for more.",
        ),
        option(
            "--batch_size", "batches", group=PICTURE, type=int, multiple=True, default=(1,), help="Prompts in one call."
        ),
    )


def call_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which denoiser, and what it is given."""
    return flagged(
        command,
        option("--component", group=MODEL, help="Which denoiser; without it the one that the pipeline calls first."),
        option(
            "--inputs",
            group=MODEL,
            type=click.Path(),
            help="Example inputs of the denoiser: torch.save({'args': (...), 'kwargs': {...}}).",
        ),
    )


def file_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What becomes of files that are there, and what new ones say of themselves."""
    return flagged(
        command,
        overwrite_flag,
        option("--no_metadata", group=OUTPUT, is_flag=True, help="Write no prompt, seed or plan into the files."),
    )


def overwrite_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """Whether files that are there may go."""
    text = "Write over files that are there; without it a terminal is asked, and others are refused."
    return option("--overwrite", group=OUTPUT, is_flag=True, help=text)(command)


def json_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    """An answer for programs."""
    return option("--json", group=OUTPUT, is_flag=True, help="Print one JSON document; all else goes to stderr.")(
        command
    )
