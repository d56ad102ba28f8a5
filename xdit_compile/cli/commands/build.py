"""Makes graphs ahead of time."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from xdit_compile.backends.target.cards import CARDS, card_for
from xdit_compile.cli.options.destination import check_place, settle
from xdit_compile.cli.options.flags import model_flags, normalized, overwrite_flag, size_flags
from xdit_compile.cli.options.plan_flags import plan_flags
from xdit_compile.cli.options.request import DEVICES, Request
from xdit_compile.cli.options.sizes import check_batches, size_in_pixels
from xdit_compile.cli.options.without_effect import tell_without_effect
from xdit_compile.cli.parsing.choices import Choices, Lines
from xdit_compile.cli.parsing.groups import COMPILE, MODEL, OUTPUT, PARALLEL, Command, option
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan


@click.command(cls=Command)
@model_flags
@size_flags
@option("--device", group=MODEL, type=Choices(DEVICES), default="auto", help="What the graphs are for.")
@option("--target", group=COMPILE, type=Choices(CARDS), help="Or a card that is not here.")
@plan_flags
@option(
    "--also",
    group=PARALLEL,
    type=Lines(),
    multiple=True,
    help="Flags of one more plan, as '--tensor_parallel_degree 4'.",
)
@option(
    "--output", group=OUTPUT, type=click.Path(path_type=Path), help="A file to pack all of it into, for other machines."
)
@overwrite_flag
def build(
    plan: Plan, sizes: Sequence[str], batches: Sequence[int], also: Sequence[str], prompt: str, output: Path | None,
    target: str | None, overwrite: bool, **flags: Any,
) -> None:  # fmt: skip
    """Make the graphs of all ranks ahead of time: one process, no weights. A run with weights compares them first."""
    plans = [plan, *(_plan_of(text, plan) for text in also)]
    request = Request(plan=plan, prompt=(prompt,), **flags)
    for each in plans:
        dataclasses.replace(request, plan=each).check(None, weights=False)
    pixels = [size_in_pixels(each) for each in sizes]
    for height, width in pixels:
        dataclasses.replace(request, height=height, width=width).check(None, weights=False)
    check_batches(batches)
    if target is not None and request.device != "auto":
        raise UsageError("--target says what the graphs are for already: leave out --device")
    card = None if target is None else card_for(target)
    if output is not None:
        check_place(str(output))
        settle([output], overwrite, World())
    tell_without_effect(request)
    from xdit_compile.cli.running.build import build as run

    for line in run(request, pixels or [None], batches, plans, output, card):
        click.echo(line)


def _plan_of(text: str, like: Plan) -> Plan:
    """The plan of some flags, with the cache of another one."""

    @click.command()
    @plan_flags
    def flags_of_a_plan(plan: Plan) -> Plan:
        return plan

    made: Plan = flags_of_a_plan.main(
        shlex.split(text), "--also", standalone_mode=False, token_normalize_func=normalized
    )
    return dataclasses.replace(made, cache=like.cache)
