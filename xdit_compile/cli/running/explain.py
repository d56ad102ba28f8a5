"""A denoiser and the inputs its pipeline would give it, from configurations alone: no weights are read or stored."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile.backends.target.pretend_card import check_versions
from xdit_compile.cli.options.request import Request, find_model
from xdit_compile.errors import UsageError, XditCompileError, one_line
from xdit_compile.weights.meta_module import component_class, empty_module
from xdit_compile.weights.model_folder import check_component, pipeline_index

from .pipeline_call import call_arguments, set_logs, weights_dtype

LARGE = 4096
CONFIGURATION = ("*.json", "*.txt", "*.model", "*.jinja")


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

    set_logs(request.debug)
    if target is not None:
        check_versions()
        request = dataclasses.replace(request, dtype="bfloat16" if request.dtype == "auto" else request.dtype)
    call = denoiser_call(request, component, inputs)
    return api.explain(call.module, request.plan, args=call.args, kwargs=call.kwargs, target=target)


def denoiser_call(
    request: Request, component: str | None = None, inputs: str | None = None, device: str = "meta"
) -> DenoiserCall:  # fmt: skip
    """Build the pipeline without weights and catch the first call of its denoiser.

    Args:
        component: names the denoiser, else it is the one called first.
        inputs: a file that gives the arguments.
        device: where they are put.
    """
    folder = _configuration_folder(request)
    check_component(folder, component)
    modules, others = _components(folder, weights_dtype(request))
    candidates = {name: module for name, module in modules.items() if _may_denoise(module)}
    if component is not None:
        if component not in modules:
            raise UsageError(f"--component {component} is no module; choose one of {', '.join(modules)}")
        candidates = {component: modules[component]}
    if inputs is not None:
        if len(candidates) != 1:
            raise UsageError(f"--inputs needs --component; choose one of {', '.join(candidates)}")
        ((name, module),) = candidates.items()
        return DenoiserCall(name, module, *_to(device, _read_inputs(inputs)))
    return _first_call(folder, request, modules, others, candidates, device)


def _first_call(
    folder: Path,
    request: Request,
    modules: dict[str, nn.Module],
    others: dict[str, Any],
    candidates: dict[str, nn.Module],
    device: str,
) -> DenoiserCall:
    stand_ins = {name: _stand_in(module) for name, module in modules.items()}
    for name in candidates:
        stand_ins[name].forward = _catch(name)  # type: ignore[method-assign]
    pipe = _pipeline_class(folder)(**others, **stand_ins)
    pipe.set_progress_bar_config(disable=True)
    arguments, _ = call_arguments(pipe, dataclasses.replace(request, num_inference_steps=2))
    try:
        with torch.no_grad(), _Unvalued():
            pipe(**arguments | ({"generator": torch.Generator()} if "generator" in arguments else {}))
    except _FirstCall as call:
        args, kwargs = _to(device, (call.call_args, call.call_kwargs))
        return DenoiserCall(call.name, candidates[call.name], args, kwargs)
    except Exception as error:
        reason = one_line(error)
        raise XditCompileError(f"the pipeline stopped before its denoiser ({reason}); give --inputs FILE") from error
    raise XditCompileError(f"the pipeline never called {' or '.join(candidates)}; choose another --component")


def _configuration_folder(request: Request) -> Path:
    name = find_model(request.model)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, cache_dir=request.download_dir, allow_patterns=list(CONFIGURATION)))
    except Exception as error:
        raise XditCompileError(f"--model {name} cannot be fetched: {one_line(error)}") from error


def _pipeline_class(folder: Path) -> Any:
    import diffusers

    name = pipeline_index(folder)["_class_name"]
    pipeline_class = getattr(diffusers, name, None)
    if pipeline_class is None:
        raise XditCompileError(f"the installed diffusers has no pipeline {name}; install a version that has it")
    return pipeline_class


def _components(folder: Path, dtype: torch.dtype) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The pipeline's modules on the meta device, and everything else that its constructor takes."""
    modules: dict[str, nn.Module] = {}
    others: dict[str, Any] = {}
    for name, entry in pipeline_index(folder).items():
        if name.startswith("_"):
            continue
        if not isinstance(entry, list | tuple):
            others[name] = entry
        elif entry[0] is None:
            others[name] = None
        else:
            kind = component_class(*entry[:2])
            if issubclass(kind, nn.Module):
                modules[name] = empty_module(kind, folder, name, dtype)
            else:
                others[name] = kind.from_pretrained(str(folder), subfolder=name)
    return modules, others


def _may_denoise(module: nn.Module) -> bool:
    """A model of diffusers that is no autoencoder."""
    from diffusers import ModelMixin

    return isinstance(module, ModelMixin) and not hasattr(module, "decode")


def _stand_in(module: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters are zeros, each a single element in memory."""
    copied = copy.deepcopy(module)
    for child in copied.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(_one_zero(parameter), requires_grad=False)
    return copied


class _Unvalued(TorchDispatchMode):
    """Large floating-point results are zeros of the right shape, each a single element in memory.

    Whole numbers, masks and small tensors keep their values, so a text encoder may look at its tokens and a scheduler
    at its time steps.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_large(args, kwargs):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            return _written(func, args, kwargs)
        if any(item.alias_info for item in func._schema.returns):
            return _viewed(func, args, kwargs)
        meta_args, meta_kwargs = _to("meta", (args, kwargs))
        try:
            result = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError):
            return func(*args, **kwargs)
        if any(not value.is_floating_point() for value in _tensors(result)):
            return func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, _one_zero, result)


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """Writing into one of those zeros leaves it as it is."""
    if args and isinstance(args[0], torch.Tensor) and args[0].numel() > 1 and not any(args[0].stride()):
        return args[0]
    return func(*args, **kwargs)


def _viewed(func: Any, args: Any, kwargs: Any) -> Any:
    """Some views need memory of their own below them."""
    try:
        return func(*args, **kwargs)
    except RuntimeError:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda value: value.contiguous(), (args, kwargs))
        return func(*args, **kwargs)


def _one_zero(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def _is_large(args: Any, kwargs: Any) -> bool:
    return any(value.is_floating_point() and value.numel() > LARGE for value in _tensors((args, kwargs)))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(tree) if isinstance(value, torch.Tensor)]


def _catch(name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise _FirstCall(name, args, kwargs)

    return forward


def _to(device: str, tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), tree)


def _read_inputs(path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        content = torch.load(path, weights_only=True)
        args, kwargs = tuple(content.get("args", ())), dict(content.get("kwargs", {}))
    except Exception as error:
        raise UsageError(
            f"--inputs {path} cannot be read; save a dict of args and kwargs: {one_line(error)}"
        ) from error
    return args, kwargs
