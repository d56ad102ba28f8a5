"""Makes pictures and videos."""

from __future__ import annotations

from typing import Any

import click

from xdit_compile.cli.options.flags import model_flags, picture_flags, plan_flags, run_flags
from xdit_compile.cli.options.request import OUTPUT_TYPES, Request
from xdit_compile.plan import Plan

from .start import start


@click.command()
@model_flags
@picture_flags
@run_flags
@click.option("--num_images_per_prompt", type=int, help="[default: the pipeline's]")
@click.option("--fps", type=int, default=Request.fps, help="Frames per second of a video file.")
@click.option("--seed", type=int, default=Request.seed)
@plan_flags
@click.option(
    "--output", help="PNG, JPEG or WebP for images, MP4 or GIF for videos, safetensors for latents.  [default: out.png]"
)
@click.option("--output_type", default=Request.output_type, help=f"{' or '.join(OUTPUT_TYPES)}: what to write.")
@click.option("--compare", is_flag=True, help="Also run the unsplit pipeline and print the greatest difference.")
def generate(plan: Plan, nproc: int | None, **flags: Any) -> None:
    """Make an image or a video."""
    start("generate", Request(plan=plan, **flags), nproc)
