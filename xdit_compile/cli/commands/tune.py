"""Times what passes can fuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from xdit_compile.cache.folder import resolve
from xdit_compile.cli.inputs.asked import check_inputs
from xdit_compile.cli.options.flags import call_flags, model_flags, size_flags
from xdit_compile.cli.options.plan_flags import plan_flags
from xdit_compile.cli.options.preflight import check_cache_folder
from xdit_compile.cli.options.request import DEVICES, Request, find_model
from xdit_compile.cli.options.sizes import check_batches, check_sizes_on_hub, size_in_pixels
from xdit_compile.cli.options.without_effect import tell_without_effect
from xdit_compile.cli.parsing.choices import Choices
from xdit_compile.cli.parsing.groups import COMPILE, MODEL, Command, option
from xdit_compile.cli.processes.ending import compilers_apart
from xdit_compile.cli.processes.speech import show_phases
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.weights.model_folder import check_component


@click.command(cls=Command)
@model_flags
@size_flags
@option("--device", group=MODEL, type=Choices(DEVICES), default="auto", help="What is timed.")
@call_flags
@option("--rounds", group=COMPILE, type=click.IntRange(3), default=25, help="Samples of each place, apart and fused.")
@option("--again", group=COMPILE, is_flag=True, help="Time places once more that were timed before.")
@plan_flags
def tune(
    plan: Plan, prompt: str, component: str | None, inputs: str | None, sizes: Sequence[str], batches: Sequence[int],
    rounds: int, again: bool, **flags: Any,
) -> None:  # fmt: skip
    """Time on this device what passes can fuse in a model, and go by that from then on. One process, no weights."""
    request = Request(plan=plan, prompt=(prompt,), **flags)
    request.check(None, weights=False)
    check_cache_folder(plan)
    check_inputs(inputs)
    check_batches(batches)
    tell_without_effect(request)
    if (folder := Path(find_model(request.model))).is_dir():
        check_component(folder, component)
    asked = [size_in_pixels(each) for each in sizes]
    for height, width in asked:
        dataclasses.replace(request, height=height, width=width).check(None, weights=False)
    pixels: Sequence[tuple[int, int] | None] = asked or [None]
    if (cache := resolve(plan.cache)) is None:
        raise UsageError("there is nowhere to keep timings: give --cache_dir, or leave out --no_cache")
    show_phases(request, World()).begin("starting")
    check_sizes_on_hub(request, asked)
    with compilers_apart(cache):
        from xdit_compile.cli.running.tune import tune as run

        for line in run(request, component, inputs, pixels, batches, again, rounds):
            click.echo(line)
