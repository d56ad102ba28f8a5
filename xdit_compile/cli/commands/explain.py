"""Prints what a plan makes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xdit_compile.backends.target.cards import CARDS, card_for
from xdit_compile.cache.folder import resolve
from xdit_compile.cli.inputs.asked import check_inputs
from xdit_compile.cli.options.answer import answering
from xdit_compile.cli.options.flags import call_flags, json_flag, model_flags, picture_flags
from xdit_compile.cli.options.plan_flags import plan_flags
from xdit_compile.cli.options.preflight import check_cache_folder
from xdit_compile.cli.options.request import Request, find_model
from xdit_compile.cli.options.sizes import check_sizes_on_hub
from xdit_compile.cli.options.without_effect import tell_without_effect
from xdit_compile.cli.parsing.choices import Choices
from xdit_compile.cli.parsing.groups import COMPILE, Command, option
from xdit_compile.cli.processes.ending import compilers_apart
from xdit_compile.cli.processes.speech import show_phases
from xdit_compile.distributed.world import World
from xdit_compile.plan import Plan
from xdit_compile.weights.model_folder import check_component


@click.command(cls=Command)
@model_flags
@picture_flags
@plan_flags
@call_flags
@option(
    "--target",
    group=COMPILE,
    type=Choices(CARDS),
    help="Also compile for a card, and count what it would run. No card is needed.",
)
@json_flag
def explain(plan: Plan, component: str | None, inputs: str | None, target: str | None, **flags: Any) -> None:
    """Print what a plan makes of a model's graph: axes, gathers, traffic. Reads no weights, needs one process."""
    request = Request(plan=plan, **flags)
    request.check(None, weights=False)
    tell_without_effect(request)
    check_cache_folder(plan)
    check_inputs(inputs)
    if (folder := Path(find_model(request.model))).is_dir():
        check_component(folder, component)
    if target is not None:
        card_for(target)
    show_phases(request, World()).begin("starting")
    check_sizes_on_hub(request)
    with compilers_apart(resolve(plan.cache)), answering(request.json) as answer:
        from xdit_compile.cli.running.explain import explain as run

        report = run(request, component, inputs, target)
        answer |= {"plan": request.plan, "report": report}
    if not request.json:
        click.echo(str(report))
