"""The flags that several commands have: of a plan, of a model, of a picture, and of what runs a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from xdit_compile.plan import Plan
from xdit_compile.plan.methods import METHODS, Method
from xdit_compile.plan.plan import BACKENDS, COMPILES, OPTIONAL_PASSES

from .request import DTYPES, Request, plan_from_flags


def normalized(name: str) -> str:
    """A flag as it is known: - and _ are the same."""
    return name.replace("-", "_")


def plan_flags(command: Callable[..., Any]) -> Callable[..., Any]:
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
        "link": click.option(
            "--link", help="Bytes per second of one ulysses rank, such as 450GB/s: hide its exchanges where that pays."
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


def model_flags(command: Callable[..., Any]) -> Callable[..., Any]:
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


def picture_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """What to show, for the commands that look at one picture or video."""
    return _flagged(
        command,
        click.option("--prompt", multiple=True, default=Request.prompt, help="Give it again for more images."),
        click.option("--num_frames", type=int, help="Frames of a video.  [default: the pipeline's]"),
    )


def run_flags(command: Callable[..., Any]) -> Callable[..., Any]:
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


def size_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The sizes and numbers of prompts, for the commands that look at several calls of a denoiser."""
    return _flagged(
        command,
        click.option(
            "--prompt", default=Request.prompt[0], help="Matters where a model's code reads what it is given."
        ),
        click.option("--num_frames", type=int, help="Frames of a video.  [default: the pipeline's]"),
        click.option("--size", "sizes", multiple=True, help="Such as 1024x1024, height first; give it again for more."),
        click.option("--batch_size", "batches", type=int, multiple=True, default=(1,), help="Prompts in one call."),
    )


def call_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which denoiser, and what it is given."""
    return _flagged(
        command,
        click.option("--component", help="Which denoiser; without it the one that the pipeline calls first."),
        click.option("--inputs", help="Example inputs of the denoiser: torch.save({'args': (...), 'kwargs': {...}})."),
    )


def _flagged(command: Callable[..., Any], *flags: Callable[..., Any]) -> Callable[..., Any]:
    for flag in reversed(flags):
        command = flag(command)
    return command
