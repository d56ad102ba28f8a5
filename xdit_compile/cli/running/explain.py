"""A denoiser and the inputs its pipeline would give it, from configurations alone: no weights are read or stored."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_compile.backends.target.pretend_card import check_versions
from xdit_compile.cli.inputs.asked import how_to_save, not_saved
from xdit_compile.cli.options.request import Request
from xdit_compile.cli.processes.speech import set_logs, show_phases
from xdit_compile.distributed.world import World
from xdit_compile.errors import CaptureError, UsageError, XditCompileError, one_line, reason_of
from xdit_compile.weights.model_folder import check_component

from .pipeline_call import call_arguments, weights_dtype
from .stand_ins import Unvalued, components, configuration_folder, may_denoise, on_device, pipeline_class, stand_in


@dataclasses.dataclass(frozen=True)
class DenoiserCall:
    """A denoiser on the meta device with one call's arguments, on the meta device as well."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _FirstCall(BaseException):
    """Leaves the pipeline at its first denoiser call; no ``except Exception`` on the way catches it."""

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(name)
        self.name, self.call_args, self.call_kwargs = name, args, kwargs


def explain(
    request: Request, component: str | None = None, inputs: str | None = None, target: str | None = None
) -> Any:  # fmt: skip
    """The report that ``api.explain`` makes of the denoiser under the request's plan.

    Args:
        target: a card that code is compiled for and counted; weights are then in bfloat16 where no dtype is asked for.

    Raises:
        UsageError: the model, the component or the file of inputs is not there.
        XditCompileError: the pipeline does not reach its denoiser without weights.
    """
    from xdit_compile import api

    shown = show_phases(request, World())
    set_logs(request)
    if target is not None:
        check_versions()
        request = dataclasses.replace(request, dtype="bfloat16" if request.dtype == "auto" else request.dtype)
    shown.begin("building the model without weights")
    call = denoiser_call(request, component, inputs)
    compiled = "" if target is None else f", compiling for {target}"
    shown.begin(f"{call.name}: capturing, passes{compiled}")
    try:
        return api.explain(call.module, request.plan, args=call.args, kwargs=call.kwargs, target=target)
    except CaptureError as error:
        if inputs is None:
            raise
        raise CaptureError(f"--inputs {inputs} may not be what {call.name} takes: {error}") from error
    finally:
        shown.over()


def denoiser_call(
    request: Request, component: str | None = None, inputs: str | None = None, device: str = "meta"
) -> DenoiserCall:  # fmt: skip
    """Build the pipeline without weights and catch the first call of its denoiser.

    Args:
        component: names the denoiser, else it is the one called first.
        inputs: a file that gives the arguments.
        device: where they are put.
    """
    folder = configuration_folder(request)
    check_component(folder, component)
    modules, others = components(folder, weights_dtype(request))
    candidates = {name: module for name, module in modules.items() if may_denoise(module)}
    if component is not None:
        if component not in modules:
            raise UsageError(f"--component {component} is no module; choose one of {', '.join(modules)}")
        candidates = {component: modules[component]}
    if inputs is not None:
        if len(candidates) != 1:
            raise UsageError(f"--inputs needs --component; choose one of {', '.join(candidates)}")
        ((name, module),) = candidates.items()
        args, kwargs = _read_inputs(inputs)
        try:
            inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"--inputs {inputs} is not what {name} takes: {error}") from error
        return DenoiserCall(name, module, *on_device(device, (args, kwargs)))
    return _first_call(folder, request, modules, others, candidates, device)


def _first_call(
    folder: Path,
    request: Request,
    modules: dict[str, nn.Module],
    others: dict[str, Any],
    candidates: dict[str, nn.Module],
    device: str,
) -> DenoiserCall:
    stand_ins = {name: stand_in(module) for name, module in modules.items()}
    for name in candidates:
        stand_ins[name].forward = _catch(name)  # type: ignore[method-assign]
    pipe = pipeline_class(folder)(**others, **stand_ins)
    pipe.set_progress_bar_config(disable=True)
    arguments, _ = call_arguments(pipe, dataclasses.replace(request, num_inference_steps=2))
    try:
        with torch.no_grad(), Unvalued():
            pipe(**arguments | ({"generator": torch.Generator()} if "generator" in arguments else {}))
    except _FirstCall as call:
        args, kwargs = on_device(device, (call.call_args, call.call_kwargs))
        return DenoiserCall(call.name, candidates[call.name], args, kwargs)
    except Exception as error:
        reason = one_line(error)
        raise XditCompileError(f"the pipeline stopped before its denoiser ({reason}); give --inputs FILE") from error
    denoisers = [name for name, module in modules.items() if may_denoise(module) and name not in candidates]
    if denoisers:
        wrong, instead = ", ".join(candidates), " or ".join(denoisers)
        raise UsageError(f"the pipeline never called --component {wrong}; take {instead}")
    raise XditCompileError(f"the pipeline never called {' or '.join(candidates)}; give --component and --inputs FILE")


def _catch(name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise _FirstCall(name, args, kwargs)

    return forward


def _read_inputs(path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    make = f"make one with {how_to_save(path)}"
    try:
        content = torch.load(path, weights_only=True)
    except OSError as error:
        raise UsageError(f"--inputs {path} cannot be read: {reason_of(error)}") from error
    except Exception as error:  # whatever unpickling raises at bytes that are no pickle
        raise UsageError(not_saved(path)) from error
    if not isinstance(content, dict) or not content.keys() & {"args", "kwargs"}:
        raise UsageError(f"--inputs {path} holds no dict with args or kwargs; {make}")
    args, kwargs = content.get("args", ()), content.get("kwargs", {})
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise UsageError(f"--inputs {path}: args must be a tuple and kwargs a dict; {make}")
    return tuple(args), kwargs
