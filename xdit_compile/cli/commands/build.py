"""Makes graphs ahead of time."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from xdit_compile.backends.target.cards import CARDS, card_for
from xdit_compile.cache.folder import resolve
from xdit_compile.cli.options.destination import check_place, settle
from xdit_compile.cli.options.flags import model_flags, normalized, overwrite_flag, size_flags
from xdit_compile.cli.options.plan_flags import plan_flags
from xdit_compile.cli.options.preflight import check_cache_folder
from xdit_compile.cli.options.request import DEVICES, Request
from xdit_compile.cli.options.sizes import check_batches, check_sizes_on_hub, size_in_pixels
from xdit_compile.cli.options.without_effect import tell_without_effect
from xdit_compile.cli.parsing.choices import Choices, Lines
from xdit_compile.cli.parsing.groups import COMPILE, MODEL, OUTPUT, PARALLEL, Command, option
from xdit_compile.cli.parsing.words import one_flag_each
from xdit_compile.cli.processes.ending import compilers_apart
from xdit_compile.cli.processes.speech import show_phases
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.plan.nearest import did_you_mean


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
    request = Request(plan=plan, prompt=(prompt,), **flags)
    request.check(None, weights=False)
    plans = [plan, *(_checked(text, request) for text in also)]
    pixels = [size_in_pixels(each) for each in sizes]
    for height, width in pixels:
        dataclasses.replace(request, height=height, width=width).check(None, weights=False)
    check_batches(batches)
    if target is not None and request.device != "auto":
        raise UsageError("--target says what the graphs are for already: leave out --device")
    card = None if target is None else card_for(target)
    if resolve(plan.cache) is None:
        raise UsageError("there is nowhere to keep graphs: give --cache_dir, or leave out --no_cache")
    check_cache_folder(plan)
    if output is not None:
        check_place(str(output))
        settle([output], overwrite, World())
    tell_without_effect(request)
    show_phases(request, World()).begin("starting")
    check_sizes_on_hub(request, pixels)
    with compilers_apart(resolve(plan.cache)):
        from xdit_compile.cli.running.build import build as run

        for line in run(request, pixels or [None], batches, plans, output, card):
            click.echo(line)


def _checked(text: str, request: Request) -> Plan:
    """The plan of some flags, with the cache of a request's, seen to go with that.

    Raises:
        UsageError: naming the flags of which something is wrong.
    """
    try:
        plan = dataclasses.replace(_plan_of(text), cache=request.plan.cache)
        dataclasses.replace(request, plan=plan).check(None, weights=False)
    except UsageError as error:
        raise UsageError(f"--also {text!r}: {error}") from error
    return plan


def _plan_of(text: str) -> Plan:
    """The plan of some flags.

    Raises:
        UsageError: there are none, or others than a plan has, or one has a wrong value.
    """

    @click.command(add_help_option=False)
    @plan_flags
    def flags_of_a_plan(plan: Plan) -> Plan:
        return plan

    try:
        words = one_flag_each(flags_of_a_plan, shlex.split(text), click.Context(flags_of_a_plan))
        context = flags_of_a_plan.make_context("--also", words.copy(), token_normalize_func=normalized)
        made: Plan = flags_of_a_plan.invoke(context)
    except click.NoSuchOption as error:
        names = [name.lstrip("-") for flag in flags_of_a_plan.params for name in flag.opts]
        near = did_you_mean(error.option_name.lstrip("-"), names, "--") or "; give such as --tensor_parallel_degree 4"
        raise UsageError(f"a plan has no flag {error.option_name}{near}") from None
    except click.UsageError as error:
        raise UsageError(error.format_message().rstrip(".")) from None
    except ValueError as error:
        raise UsageError(f"{error}; close the quotes") from None
    if not words:
        raise UsageError("there is no flag in it; give flags of one more plan, or leave it out")
    return made
