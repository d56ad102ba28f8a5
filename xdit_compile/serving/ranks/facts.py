"""What clients are told of a pipeline: what it makes, what its call takes, and what it does where they say nothing."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from xdit_compile.cli.inputs.annotations import arguments_of
from xdit_compile.cli.inputs.call_source import call_of
from xdit_compile.cli.options.request import PipelineRequest
from xdit_compile.cli.options.result_kind import kind_of
from xdit_compile.runtime.diffusers_pipeline import STEPS, denoisers


def facts_of(pipe: Any, request: PipelineRequest) -> dict[str, Any]:
    """Plain data about a pipeline.

    Args:
        request: what the server was started with.

    Returns:
        ``class``, ``makes``, ``takes``, ``kinds`` (annotation and default of each argument, as source), ``dtype``, and
        where they are known ``size`` (height and width in pixels) and ``steps``.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    named = [each for each in list(parameters.values())[1:] if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    call = call_of(pipe)
    arguments = {} if call is None else arguments_of(call)
    defaults = {each.name: each.default for each in named}
    known = {"size": _size(pipe, request, defaults), "steps": request.num_inference_steps or _whole(defaults, STEPS)}
    return {
        "class": type(pipe).__name__,
        "makes": kind_of(pipe) or "images",
        "takes": list(defaults),
        "kinds": {name: [_source(each.annotation), _source(each.default)] for name, each in arguments.items()},
        "dtype": str(getattr(pipe, "dtype", "")).removeprefix("torch."),
        **{name: value for name, value in known.items() if value is not None},
    }


def _size(pipe: Any, request: PipelineRequest, defaults: dict[str, Any]) -> list[int] | None:
    """Height and width of what is made where none are asked for: by the server's flags, the call's defaults, or else
    what pipelines of diffusers take, the size of a sample times the autoencoder's factor."""
    if not {"height", "width"} <= set(defaults):
        return None
    asked = [request.height or _whole(defaults, "height"), request.width or _whole(defaults, "width")]
    factor = getattr(pipe, "vae_scale_factor", None)
    configurations = [getattr(module, "config", None) for _, module in denoisers(pipe)]
    of_models = [getattr(each, "sample_size", None) for each in configurations]
    samples = [each for each in (getattr(pipe, "default_sample_size", None), *of_models) if isinstance(each, int)]
    usual = samples[0] * factor if samples and isinstance(factor, int) else None
    sides = [side or usual for side in asked]
    return None if None in sides else [side for side in sides if side is not None]


def _whole(defaults: dict[str, Any], name: str) -> int | None:
    value = defaults.get(name)
    return value if type(value) is int and value > 0 else None


def _source(expression: ast.expr | None) -> str | None:
    return None if expression is None else ast.unparse(expression)
