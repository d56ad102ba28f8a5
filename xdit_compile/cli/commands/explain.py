"""Prints what a plan makes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xdit_compile.backends.target.cards import CARDS, card_for
from xdit_compile.cli.options.flags import call_flags, model_flags, picture_flags, plan_flags
from xdit_compile.cli.options.request import Request, check_inputs, find_model
from xdit_compile.plan import Plan
from xdit_compile.weights.model_folder import check_component


@click.command()
@model_flags
@picture_flags
@plan_flags
@call_flags
@click.option(
    "--target", help=f"Also compile for a card, and count what it would run: {', '.join(CARDS)}. No card is needed."
)
def explain(plan: Plan, component: str | None, inputs: str | None, target: str | None, **flags: Any) -> None:
    """Print what a plan makes of a model's graph: axes, gathers, traffic. Reads no weights, needs one process."""
    request = Request(plan=plan, **flags)
    request.check(None, weights=False)
    check_inputs(inputs)
    if (folder := Path(find_model(request.model))).is_dir():
        check_component(folder, component)
    if target is not None:
        card_for(target)
    from xdit_compile.cli.running.explain import explain as run

    click.echo(str(run(request, component, inputs, target)))
