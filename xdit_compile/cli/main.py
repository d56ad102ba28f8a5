"""The command line: flags, one line per error, exit code 2 for usage and 1 for failure. Imports torch only to work."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from xdit_compile import __version__
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError, one_line
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import METHODS, Method
from xdit_compile.plan.plan import BACKENDS, COMPILES, OPTIONAL_PASSES
from xdit_compile.weights.model_folder import check_component

from .cache import cache
from .evaluation_request import DEFAULT_COUNT, FEATURES, EvaluationRequest
from .request import DTYPES, OUTPUT_TYPES, PipelineRequest, Request, check_inputs, find_model, plan_from_flags

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


def _plan_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of a plan; the command is given the plan that they make."""
    flags = {**_degree_flags(), **_vae_flags(), **_choice_flags(), **_cache_flags()}

    @functools.wraps(command)
    def with_plan(**given: Any) -> Any:
        plan = plan_from_flags(**{name: given.pop(name) for name in flags})
        return command(plan=plan, **given)

    return _flagged(with_plan, *flags.values())


def _degree_flags() -> dict[str, Any]:
    return {method.flag: _degree_flag(method) for method in METHODS} | {
        "num_pipeline_patch": click.option(
            "--num_pipeline_patch", type=int, help="Parts of the tokens.  [default: as many as stages]"
        ),
        "warmup_steps": click.option(
            "--warmup_steps", type=int, default=1, help="First steps, which compute all tokens at once."
        ),
        "attn_layer_num_for_pp": click.option(
            "--attn_layer_num_for_pp", help="Blocks of each stage, as 10,9.  [default: even by cost]"
        ),
    }


def _degree_flag(method: Method) -> Any:
    if method.flag_degree is None:
        return click.option(f"--{method.flag}", type=int, default=1, help=f"{method.help[0].upper()}{method.help[1:]}.")
    return click.option(f"--{method.flag}", is_flag=True, help=f"{method.flag_degree} {method.help}.")


def _vae_flags() -> dict[str, Any]:
    return {
        "use_parallel_vae": click.option(
            "--use_parallel_vae", is_flag=True, help="Split the rows that the autoencoder decodes and encodes."
        ),
        "vae_parallel_degree": click.option(
            "--vae_parallel_degree", type=int, help="Ranks that share these rows.  [default: all of one image]"
        ),
        "vae_provider": click.option(
            "--vae_provider", default="patch", help="Who splits them: patch, our own, or distvae, the package."
        ),
        "vae_memory": click.option(
            "--vae_memory", help="What the parallel autoencoder may take beside weights on a rank, such as 2GiB."
        ),
    }


def _choice_flags() -> dict[str, Any]:
    return {
        "split_scheme": click.option(
            "--split_scheme",
            default=Plan.split_scheme,
            help="What tensor parallel splits: all (also row), heads or ffn.",
        ),
        "mesh_order": click.option(
            "--mesh_order", default=",".join(Plan.mesh_order), help="Degrees from the farthest ranks to the nearest."
        ),
        "backend": click.option("--backend", default=Plan.backend, help=f"{', '.join(BACKENDS)}."),
        "compile_mode": click.option(
            "--compile_mode",
            default=Plan.compile_mode,
            help="Inductor's: default, or max-autotune-no-cudagraphs, which compiles for longer.",
        ),
        "without": click.option(
            "--without", default="", help=f"Passes to leave out, by comma: {', '.join(OPTIONAL_PASSES)}."
        ),
        "attention": click.option(
            "--attention", default=Plan.attention, help="Attention provider; auto takes the best available."
        ),
        "fallback": click.option(
            "--fallback",
            default=Plan.fallback,
            help="What cannot be split: gather it, error, or unsplit (run a denoiser whole that cannot be captured).",
        ),
    }


def _cache_flags() -> dict[str, Any]:
    return {
        "cache_dir": click.option(
            "--cache_dir", help="Where compiled graphs are kept.  [default: $XDIT_COMPILE_CACHE or the user's cache]"
        ),
        "compile": click.option(
            "--compile", default=Plan.compile, help=f"{' or '.join(COMPILES)}: whether a new size waits for its graphs."
        ),
        "no_cache": click.option("--no_cache", is_flag=True, help="Keep no compiled graphs, and use none."),
    }


def _model_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of whatever runs a pipeline."""
    return _flagged(
        command,
        click.option("--model", help="Pipeline folder or Hub id; without it the embedded one, which draws shapes."),
        click.option("--negative_prompt"),
        click.option("--height", type=int, help="Pixels.  [default: the pipeline's]"),
        click.option("--width", type=int, help="Pixels.  [default: the pipeline's]"),
        click.option("--guidance_scale", type=float, help="[default: the pipeline's]"),
        click.option("--max_sequence_length", type=int, help="Text tokens.  [default: the pipeline's]"),
        click.option(
            "--use_resolution_binning/--no_use_resolution_binning",
            default=None,
            help="Work at the nearest of the pipeline's own sizes and resize.  [default: without a size]",
        ),
        click.option("--dtype", default="auto", help=f"auto or {', '.join(DTYPES)}; auto is bfloat16 on CUDA."),
        click.option("--download_dir", help="Where models of the Hub are kept.  [default: the Hub's cache]"),
        click.option("--trust_remote_code", is_flag=True, help="Run the code that a model of the Hub brings along."),
        click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own messages."),
    )


def _picture_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What to show, for the commands that look at one picture or video."""
    return _flagged(
        command,
        click.option("--prompt", multiple=True, default=Request.prompt, help="Give it again for more images."),
        click.option("--num_frames", type=int, help="Frames of a video.  [default: the pipeline's]"),
    )


def _run_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of what runs a pipeline to the end."""
    return _flagged(
        command,
        click.option("--num_inference_steps", type=int, help="[default: the pipeline's]"),
        click.option("--device", default="auto", help="auto, cpu or cuda."),
        click.option("--enable_model_cpu_offload", is_flag=True, help="Keep models on the CPU while they do not run."),
        click.option(
            "--enable_sequential_cpu_offload", is_flag=True, help="Keep layers on the CPU while they do not run."
        ),
        click.option("--nproc", type=int, help="Start this many processes here; leave it out under torchrun."),
    )


def _flagged(command: Callable[..., Any], *flags: Callable[..., Any]) -> Callable[..., Any]:
    for flag in reversed(flags):
        command = flag(command)
    return command


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__)
def cli() -> None:
    """Parallel inference for unmodified diffusers pipelines. Flags may be written with - or _."""


cli.add_command(cache)


@cli.command()
@_model_flags
@_picture_flags
@_run_flags
@click.option("--num_images_per_prompt", type=int, help="[default: the pipeline's]")
@click.option("--fps", type=int, default=Request.fps, help="Frames per second of a video file.")
@click.option("--seed", type=int, default=Request.seed)
@_plan_flags
@click.option(
    "--output", help="PNG, JPEG or WebP for images, MP4 or GIF for videos, safetensors for latents.  [default: out.png]"
)
@click.option("--output_type", default=Request.output_type, help=f"{' or '.join(OUTPUT_TYPES)}: what to write.")
@click.option("--compare", is_flag=True, help="Also run the unsplit pipeline and print the greatest difference.")
def generate(plan: Plan, nproc: int | None, **flags: Any) -> None:
    """Make an image or a video."""
    _start("generate", Request(plan=plan, **flags), nproc)


@cli.command()
@_model_flags
@_run_flags
@click.option("--prompts", help="A file with one prompt a line; without it, captions of drawn scenes.")
@click.option("--num_prompts", type=int, help=f"How many of them.  [default: all; {DEFAULT_COUNT} captions]")
@click.option(
    "--seed", type=int, default=EvaluationRequest.seed, help="Of the first picture; each next one has one more."
)
@click.option("--batch_size", type=int, default=EvaluationRequest.batch_size, help="Prompts in one call.")
@_plan_flags
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
@_model_flags
@click.option("--prompt", default=Request.prompt[0], help="Matters where a model's code reads what it is given.")
@click.option("--num_frames", type=int, help="Frames of a video.  [default: the pipeline's]")
@click.option("--device", default="auto", help="What the graphs are for: auto, cpu or cuda.")
@click.option("--size", "sizes", multiple=True, help="Such as 1024x1024, height first; give it again for more.")
@click.option("--batch_size", "batches", type=int, multiple=True, default=(1,), help="Prompts in one call.")
@_plan_flags
@click.option("--also", multiple=True, help="Flags of one more plan, as '--tensor_parallel_degree 4'.")
@click.option("--output", type=click.Path(path_type=Path), help="A file to pack all of it into, for other machines.")
def build(
    plan: Plan, sizes: Sequence[str], batches: Sequence[int], also: Sequence[str], prompt: str, output: Path | None,
    **flags: Any,
) -> None:  # fmt: skip
    """Make the graphs of all ranks ahead of time: one process, no weights. A run with weights compares them first."""
    plans = [plan, *(_plan_of(text, plan) for text in also)]
    request = Request(plan=plan, prompt=(prompt,), **flags)
    for each in plans:
        dataclasses.replace(request, plan=each).check(None, weights=False)
    if any(batch < 1 for batch in batches):
        raise UsageError("--batch_size must be at least 1")
    from .build import build as run

    for line in run(request, [_size(each) for each in sizes] or [None], batches, plans, output):
        click.echo(line)


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--size {text} must be a height and a width in pixels, such as 1024x768")
    return int(sides[0]), int(sides[1])


def _plan_of(text: str, like: Plan) -> Plan:
    """The plan of some flags, with the cache of another one."""

    @click.command()
    @_plan_flags
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
@_model_flags
@_picture_flags
@_plan_flags
@click.option("--component", help="Which denoiser; without it the one that the pipeline calls first.")
@click.option("--inputs", help="Example inputs of the denoiser: torch.save({'args': (...), 'kwargs': {...}}).")
def explain(plan: Plan, component: str | None, inputs: str | None, **flags: Any) -> None:
    """Print what a plan makes of a model's graph: axes, gathers, traffic. Reads no weights, needs one process."""
    request = Request(plan=plan, **flags)
    request.check(None, weights=False)
    check_inputs(inputs)
    if (folder := Path(find_model(request.model))).is_dir():
        check_component(folder, component)
    from .explain import explain as run

    click.echo(str(run(request, component, inputs)))
