"""Compares the pictures of a plan with those of one process."""

from __future__ import annotations

from typing import Any

import click

from xdit_compile.cli.options.evaluation_request import DEFAULT_COUNT, FEATURES, EvaluationRequest
from xdit_compile.cli.options.flags import file_flags, json_flag, model_flags, run_flags
from xdit_compile.cli.options.plan_flags import plan_flags
from xdit_compile.cli.parsing.choices import Choices
from xdit_compile.cli.parsing.groups import OUTPUT, PICTURE, Command, option
from xdit_compile.plan import Plan

from .start import start


@click.command(cls=Command)
@model_flags
@run_flags
@option(
    "--prompts",
    group=PICTURE,
    type=click.Path(),
    help="A file with one prompt a line; without it, captions of drawn scenes.",
)
@option("--num_prompts", group=PICTURE, type=int, help=f"How many of them.  [default: all; {DEFAULT_COUNT} captions]")
@option(
    "--seed",
    group=PICTURE,
    type=int,
    default=EvaluationRequest.seed,
    help="Of the first picture; each next one has one more.",
)
@option("--batch_size", group=PICTURE, type=int, default=EvaluationRequest.batch_size, help="Prompts in one call.")
@plan_flags
@option(
    "--features",
    group=OUTPUT,
    type=Choices(FEATURES),
    default=EvaluationRequest.features,
    help="Of the Frechet distance.",
)
@option("--images", group=OUTPUT, is_flag=True, help="Also write every picture.")
@option(
    "--reference",
    group=OUTPUT,
    type=click.Path(),
    help="Output folder of an evaluation with --images: takes the pictures of one process from there.",
)
@option(
    "--output",
    group=OUTPUT,
    type=click.Path(),
    default=EvaluationRequest.output,
    help="Folder for report.json and sheet.png.",
)
@file_flags
@json_flag
def evaluate(plan: Plan, nproc: int | None, **flags: Any) -> None:
    """Compare the pictures of a plan with those of one process: distances, what they show, a sheet of both."""
    start("evaluate", EvaluationRequest(plan=plan, **flags), nproc)
