"""The command line: flags, one line per error, exit code 2 for usage and 1 for failure. Imports torch only to work."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from xdit_compile import __version__
from xdit_compile.backends.target.cards import CARDS, card_for
from xdit_compile.cache.folder import resolve
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError, one_line
from xdit_compile.plan import Plan
from xdit_compile.weights.model_folder import check_component

from .cache import cache
from .evaluation_request import DEFAULT_COUNT, FEATURES, EvaluationRequest
from .flags import call_flags, model_flags, picture_flags, plan_flags, run_flags, size_flags
from .request import OUTPUT_TYPES, PipelineRequest, Request, check_inputs, find_model

NAME = "xdit-compile"
INTERRUPTED = 130
_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
    "show_default": True,
    "token_normalize_func": lambda name: name.replace("-", "_"),
}


_PARSING = {"token_normalize_func": _SETTINGS["token_normalize_func"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr, or a traceback with --debug.

    The line of a worker's failure stands alone: a progress bar may have been left open where it would go.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        cli.main(args=arguments or ["--help"], prog_name=NAME, standalone_mode=False)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", NAME)
        return _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", error.exit_code)
    except Exception as error:
        return _failed(error, arguments)


def entry() -> None:
    """The installed command."""
    sys.exit(main())


def _failed(error: Exception, arguments: list[str]) -> int:
    from .launch import WorkerFailed, report_failure

    is_worker = arguments[:1] == ["worker"]
    if _wants_debug(arguments, is_worker) and not isinstance(error, WorkerFailed):
        import traceback

        traceback.print_exc()
    if isinstance(error, XditCompileError):
        message, exit_code = one_line(error, limit=4000), error.exit_code
    else:
        message, exit_code = f"{type(error).__name__}: {one_line(error)} (--debug shows where)", 1
    if is_worker:
        report_failure(error, exit_code, message)
        return exit_code
    if isinstance(error, WorkerFailed):
        print(file=sys.stderr)
    return _fail(message, exit_code)


def _wants_debug(arguments: list[str], is_worker: bool) -> bool:
    return bool(json.loads(arguments[-1])["debug"]) if is_worker else "--debug" in arguments


def _fail(message: str, exit_code: int) -> int:
    print(f"{NAME}: error: {_rank_prefix()}{message}", file=sys.stderr, flush=True)
    return exit_code


def _rank_prefix() -> str:
    try:
        world = World.from_environment()
    except UsageError:
        return ""
    return f"rank {world.rank}: " if world.launched else ""


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__)
def cli() -> None:
    """Parallel inference for unmodified diffusers pipelines. Flags may be written with - or _."""


cli.add_command(cache)


@cli.command()
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
    _start("generate", Request(plan=plan, **flags), nproc)


@cli.command()
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
    _start("evaluate", EvaluationRequest(plan=plan, **flags), nproc)


def _start(command: str, request: PipelineRequest, nproc: int | None) -> None:
    """Check a request, then run it here or in processes of its own."""
    world = World.from_environment()
    request.check(world, nproc)
    if nproc is None or nproc == 1:
        _run(request, world)
    else:
        from .launch import launch

        launch(["worker", command, request.to_json()], nproc, request.debug)


def _run(request: PipelineRequest, world: World) -> None:
    if isinstance(request, EvaluationRequest):
        from .evaluate import evaluate as compare

        compare(request, world)
    elif isinstance(request, Request):
        from .generate import generate as make

        make(request, world)


@cli.command()
@model_flags
@size_flags
@click.option("--device", default="auto", help="What the graphs are for: auto, cpu or cuda.")
@click.option("--target", help=f"Or a card that is not here: {', '.join(CARDS)}.")
@plan_flags
@click.option("--also", multiple=True, help="Flags of one more plan, as '--tensor_parallel_degree 4'.")
@click.option("--output", type=click.Path(path_type=Path), help="A file to pack all of it into, for other machines.")
def build(
    plan: Plan, sizes: Sequence[str], batches: Sequence[int], also: Sequence[str], prompt: str, output: Path | None,
    target: str | None, **flags: Any,
) -> None:  # fmt: skip
    """Make the graphs of all ranks ahead of time: one process, no weights. A run with weights compares them first."""
    plans = [plan, *(_plan_of(text, plan) for text in also)]
    request = Request(plan=plan, prompt=(prompt,), **flags)
    for each in plans:
        dataclasses.replace(request, plan=each).check(None, weights=False)
    _check_batches(batches)
    if target is not None and request.device != "auto":
        raise UsageError("--target says what the graphs are for already: leave out --device")
    card = None if target is None else card_for(target)
    from .build import build as run

    for line in run(request, [_size(each) for each in sizes] or [None], batches, plans, output, card):
        click.echo(line)


@cli.command()
@model_flags
@size_flags
@click.option("--device", default="auto", help="What is timed: auto, cpu or cuda.")
@call_flags
@click.option("--rounds", type=click.IntRange(3), default=25, help="Samples of each place, apart and fused.")
@click.option("--again", is_flag=True, help="Time places once more that were timed before.")
@plan_flags
def tune(
    plan: Plan, prompt: str, component: str | None, inputs: str | None, sizes: Sequence[str], batches: Sequence[int],
    rounds: int, again: bool, **flags: Any,
) -> None:  # fmt: skip
    """Time on this device what passes can fuse in a model, and go by that from then on. One process, no weights."""
    request = Request(plan=plan, prompt=(prompt,), **flags)
    request.check(None, weights=False)
    check_inputs(inputs)
    _check_batches(batches)
    if (folder := Path(find_model(request.model))).is_dir():
        check_component(folder, component)
    pixels: Sequence[tuple[int, int] | None] = [_size(each) for each in sizes] or [None]
    if resolve(plan.cache) is None:
        raise UsageError("there is nowhere to keep timings: give --cache_dir, or leave out --no_cache")
    from .tune import tune as run

    for line in run(request, component, inputs, pixels, batches, again, rounds):
        click.echo(line)


def _check_batches(batches: Sequence[int]) -> None:
    if any(batch < 1 for batch in batches):
        raise UsageError("--batch_size must be at least 1")


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--size {text} must be a height and a width in pixels, such as 1024x768")
    return int(sides[0]), int(sides[1])


def _plan_of(text: str, like: Plan) -> Plan:
    """The plan of some flags, with the cache of another one."""

    @click.command()
    @plan_flags
    def flags_of_a_plan(plan: Plan) -> Plan:
        return plan

    made: Plan = flags_of_a_plan.main(shlex.split(text), "--also", standalone_mode=False, **_PARSING)
    return dataclasses.replace(made, cache=like.cache)


@cli.command(hidden=True)
@click.argument("command", type=click.Choice(["generate", "evaluate"]))
@click.argument("request_json")
def worker(command: str, request_json: str) -> None:
    """One of the processes that --nproc starts."""
    from .launch import end_with_parent

    end_with_parent()
    kind: type[PipelineRequest] = EvaluationRequest if command == "evaluate" else Request
    _run(kind.from_json(request_json), World.from_environment())


@cli.command()
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
    from .explain import explain as run

    click.echo(str(run(request, component, inputs, target)))
