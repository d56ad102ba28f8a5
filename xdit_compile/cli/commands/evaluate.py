"""Compares the pictures of a plan with those of one process."""

from __future__ import annotations

from typing import Any

import click

from xdit_compile.cli.options.evaluation_request import DEFAULT_COUNT, FEATURES, EvaluationRequest
from xdit_compile.cli.options.flags import model_flags, plan_flags, run_flags
from xdit_compile.plan import Plan

from .start import start


@click.command()
@model_flags
@run_flags
@click.option("--prompts", help="A file with one prompt a line; without it, captions of drawn scenes.")
@click.option("--num_prompts", type=int, help=f"How many of them.  [default: all; {DEFAULT_COUNT} captions]")
@click.option(
    "--seed", type=int, default=EvaluationRequest.seed, help="Of the first picture; each next one has one more."
)
@click.option("--batch_size", type=int, default=EvaluationRequest.batch_size, help="Prompts in one call.")
@plan_flags
@click.option(
    "--features", default=EvaluationRequest.features, help=f"Of the Frechet distance: {' or '.join(FEATURES)}."
)
@click.option("--images", is_flag=True, help="Also write every picture.")
@click.option(
    "--reference", help="Output folder of an evaluation with --images: takes the pictures of one process from there."
)
@click.option("--output", default=EvaluationRequest.output, help="Folder for report.json and sheet.png.")
def evaluate(plan: Plan, nproc: int | None, **flags: Any) -> None:
    """Compare the pictures of a plan with those of one process: distances, what they show, a sheet of both."""
    start("evaluate", EvaluationRequest(plan=plan, **flags), nproc)
