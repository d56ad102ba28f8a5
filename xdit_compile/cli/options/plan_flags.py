"""The flags of a plan: degrees, the autoencoder, ranks, compiling, the cache, and xDiT's words for some of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

from xdit_compile.cli.parsing.choices import Choices, NamesByComma
from xdit_compile.cli.parsing.groups import COMPILE, PARALLEL, flagged, option
from xdit_compile.cli.parsing.xdit_flags import XDIT_ATTENTIONS, in_our_words
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import METHODS, Method
from xdit_compile.plan.plan import (
    ATTENTIONS,
    BACKENDS,
    COMPILE_MODES,
    COMPILES,
    FALLBACKS,
    OPTIONAL_PASSES,
    SPLIT_SCHEMES,
    VAES,
)

from .request import plan_from_flags


def plan_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of a plan; the command is given the plan that they make."""
    flags = {
        **_degree_flags(),
        **_vae_flags(),
        **_rank_flags(),
        **_compiler_flags(),
        **_choice_flags(),
        **_cache_flags(),
        **_xdit_flags(),
    }

    @functools.wraps(command)
    def with_plan(**given: Any) -> Any:
        plan = plan_from_flags(**in_our_words({name: given.pop(name) for name in flags}))
        return command(plan=plan, **given)

    return flagged(with_plan, *flags.values())


def _degree_flags() -> dict[str, Any]:
    return {method.flag: _degree_flag(method) for method in METHODS} | {
        "num_pipeline_patch": option(
            "--num_pipeline_patch", group=PARALLEL, type=int, help="Parts of the tokens.  [default: as many as stages]"
        ),
        "warmup_steps": option(
            "--warmup_steps", group=PARALLEL, type=int, default=1, help="First steps, which compute all tokens at once."
        ),
        "attn_layer_num_for_pp": option(
            "--attn_layer_num_for_pp", group=PARALLEL, help="Blocks of each stage, as 10,9.  [default: even by cost]"
        ),
    }


def _degree_flag(method: Method) -> Any:
    if method.flag_degree is None:
        return option(
            f"--{method.flag}", group=PARALLEL, type=int, default=1, help=f"{method.help[0].upper()}{method.help[1:]}."
        )
    return option(f"--{method.flag}", group=PARALLEL, is_flag=True, help=f"{method.flag_degree} {method.help}.")


def _vae_flags() -> dict[str, Any]:
    return {
        "use_parallel_vae": option(
            "--use_parallel_vae",
            group=PARALLEL,
            is_flag=True,
            help="Split the rows that the autoencoder decodes and encodes.",
        ),
        "vae_parallel_degree": option(
            "--vae_parallel_degree",
            "--vae_parallel_size",
            "vae_parallel_degree",
            group=PARALLEL,
            type=int,
            help="Ranks that share these rows.  [default: all of one image]",
        ),
        "vae_provider": option(
            "--vae_provider",
            group=PARALLEL,
            type=Choices(name for name in VAES if name != "whole"),
            default="patch",
            help="Who splits them: patch is our own, distvae the package.",
        ),
        "vae_memory": option(
            "--vae_memory",
            group=PARALLEL,
            help="What the parallel autoencoder may take beside weights on a rank, such as 2GiB.",
        ),
    }


def _rank_flags() -> dict[str, Any]:
    return {
        "split_scheme": option(
            "--split_scheme",
            group=PARALLEL,
            type=Choices(SPLIT_SCHEMES, {"row": "all"}),
            default=Plan.split_scheme,
            help="What tensor parallel splits; row, as xDiT calls it, is all.",
        ),
        "mesh_order": option(
            "--mesh_order",
            group=PARALLEL,
            default=",".join(Plan.mesh_order),
            help="Degrees from the farthest ranks to the nearest.",
        ),
        "link": option(
            "--link",
            group=PARALLEL,
            help="Bytes per second of one ulysses rank, such as 450GB/s: hide its exchanges where that pays.",
        ),
        "timeout": option(
            "--timeout",
            group=PARALLEL,
            type=float,
            default=Plan.timeout_s,
            help="Seconds without a sign of life of a process after which all end.",
        ),
    }


def _compiler_flags() -> dict[str, Any]:
    return {
        "backend": option(
            "--backend", group=COMPILE, type=Choices(BACKENDS), default=Plan.backend, help="What runs the graphs."
        ),
        "compile_mode": option(
            "--compile_mode",
            group=COMPILE,
            type=Choices(COMPILE_MODES),
            default=Plan.compile_mode,
            help="Inductor's; max-autotune compiles for longer, reduce-overhead replays CUDA graphs, on one rank.",
        ),
        "backend_options": option(
            "--backend_options",
            group=COMPILE,
            default="",
            help="More of its settings: NAME=VALUE,NAME=VALUE or a JSON object, such as max_autotune=true.",
        ),
        "without": option(
            "--without",
            group=COMPILE,
            type=NamesByComma(OPTIONAL_PASSES),
            default="",
            help=f"Passes to leave out, by comma: {', '.join(OPTIONAL_PASSES)}.",
        ),
    }


def _choice_flags() -> dict[str, Any]:
    return {
        "attention": option(
            "--attention",
            "--attention_backend",
            "attention",
            group=COMPILE,
            type=Choices(ATTENTIONS, XDIT_ATTENTIONS),
            default=Plan.attention,
            help="Attention provider; auto takes the best available.",
        ),
        "fallback": option(
            "--fallback",
            group=COMPILE,
            type=Choices(FALLBACKS),
            default=Plan.fallback,
            help="What cannot be split: gather it, refuse it, or run a denoiser whole that cannot be captured.",
        ),
    }


def _cache_flags() -> dict[str, Any]:
    return {
        "cache_dir": option(
            "--cache_dir",
            group=COMPILE,
            type=click.Path(),
            help="Where compiled graphs are kept.  [default: $XDIT_COMPILE_CACHE or the user's cache]",
        ),
        "compile": option(
            "--compile",
            group=COMPILE,
            type=Choices(COMPILES),
            default=Plan.compile,
            help="Whether a new size waits for its graphs.",
        ),
        "no_cache": option("--no_cache", group=COMPILE, is_flag=True, help="Keep no compiled graphs, and use none."),
    }


def _xdit_flags() -> dict[str, Any]:
    return {
        "dit_parallel_size": option(
            "--dit_parallel_size",
            group=PARALLEL,
            type=int,
            default=0,
            help="Ranks of the denoiser, as xDiT counts them: to be the product of the degrees.  [default: that]",
            show_default=False,
        ),
        "use_torch_compile": option(
            "--use_torch_compile", group=COMPILE, is_flag=True, help="The same as --backend inductor."
        ),
        "use_onediff": option("--use_onediff", group=COMPILE, is_flag=True, help="The same as --backend nexfort."),
        "use_cuda_graph": option(
            "--use_cuda_graph", group=COMPILE, is_flag=True, help="The same as --compile_mode reduce-overhead."
        ),
    }
