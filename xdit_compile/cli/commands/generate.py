"""Makes pictures and videos."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from xdit_compile.cli.inputs.asked import prompts_in
from xdit_compile.cli.options.destination import OUTPUT_TYPES
from xdit_compile.cli.options.flags import (
    file_flags,
    input_flags,
    json_flag,
    model_flags,
    picture_flags,
    repeat_flags,
    run_flags,
)
from xdit_compile.cli.options.plan_flags import plan_flags
from xdit_compile.cli.options.request import Request
from xdit_compile.cli.parsing.choices import Choices
from xdit_compile.cli.parsing.groups import OUTPUT, PICTURE, Command, option
from xdit_compile.plan import Plan

from .start import start


@click.command(cls=Command)
@model_flags
@picture_flags
@run_flags
@repeat_flags
@input_flags
@option("--num_images_per_prompt", group=PICTURE, type=int, help="[default: the pipeline's]")
@option("--fps", group=OUTPUT, type=int, default=Request.fps, help="Frames per second of a video file.")
@option("--seed", group=PICTURE, type=int, default=Request.seed, help="Of the first image; each next one has one more.")
@plan_flags
@option(
    "--output",
    group=OUTPUT,
    type=click.Path(),
    help="PNG, JPEG or WebP for images, MP4 or GIF for videos, safetensors for latents.  [default: out.png or out.mp4]",
)
@option("--output_type", group=OUTPUT, type=Choices(OUTPUT_TYPES), default=Request.output_type, help="What to write.")
@file_flags
@option(
    "--compare", group=OUTPUT, is_flag=True, help="Also run the unsplit pipeline and print the greatest difference."
)
@json_flag
@click.pass_context
def generate(context: click.Context, plan: Plan, nproc: int | None, prompt_file: str | None, **flags: Any) -> None:
    """Make an image or a video."""
    if prompt_file is not None:
        by_default = context.get_parameter_source("prompt") is ParameterSource.DEFAULT
        flags["prompt"] = (*(() if by_default else flags["prompt"]), *prompts_in(prompt_file, "--prompt_file"))
    start("generate", Request(plan=plan, **flags), nproc)
