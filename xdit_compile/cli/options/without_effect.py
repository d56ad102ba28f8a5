"""Flags that were given and change nothing under this plan or with this pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click
from click.core import ParameterSource

from xdit_compile.cli.parsing.warned import warn
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import METHODS

from .request import PipelineRequest

_STALE = " or ".join(f"--{method.flag}" for method in METHODS if method.stale)
_RULES: dict[str, tuple[Callable[[Plan], bool], str]] = {
    "warmup_steps": (lambda plan: plan.is_stale, f"only {_STALE} takes anything from the step before"),
    "split_scheme": (lambda plan: plan.tensor > 1, "it says what --tensor_parallel_degree splits"),
    "mesh_order": (lambda plan: len(plan.used) > 1, "it orders degrees, and there are not two"),
    "link": (lambda plan: plan.ulysses > 1, "it is for exchanges of --ulysses_degree"),
    "vae_provider": (lambda plan: plan.vae != "whole", "it is for --use_parallel_vae"),
    "compile": (lambda plan: plan.backend != "eager", "--backend eager compiles nothing"),
}
"""Flags with whether a plan has a use for each, and what it would be for."""


def tell_without_effect(request: PipelineRequest) -> None:
    """Say on stderr which flags of this command change nothing, one line each."""
    context = click.get_current_context(silent=True)
    if context is not None:
        for line in without_effect(request, lambda name: _is_given(context, name)):
            warn(line)


def without_effect(request: PipelineRequest, is_given: Callable[[str], bool]) -> Iterator[str]:
    """Which flags of a request change nothing.

    Args:
        request: a request without problems.
        is_given: says of a flag whether somebody gave it.
    """
    plan, steps = request.plan, request.num_inference_steps
    for name, (is_used, why) in _RULES.items():
        if is_given(name) and not is_used(plan):
            yield f"--{name} has no effect: {why}"
    if plan.is_stale and steps is not None and plan.warmup_steps >= steps:
        yield f"--warmup_steps {plan.warmup_steps} of {steps} steps leaves none in which {_STALE} takes effect"
    if is_given("fps") and getattr(request, "kind", None) == "images":
        yield "--fps has no effect: this pipeline makes images"


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
