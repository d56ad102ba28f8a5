"""A pipeline's parts from its configurations alone: modules without weights, and stand-ins that compute nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile.cli.options.request import PipelineRequest, find_model
from xdit_compile.errors import XditCompileError
from xdit_compile.weights.hub_files import fetched
from xdit_compile.weights.meta_module import component_class, empty_module
from xdit_compile.weights.model_folder import pipeline_index

LARGE = 4096
CONFIGURATION = ("*.json", "*.txt", "*.model", "*.jinja")


def configuration_folder(request: PipelineRequest) -> Path:
    """The folder of a request's model; of one of the Hub the small files alone, which are fetched.

    Raises:
        XditCompileError: they cannot be fetched.
    """
    name = find_model(request.model)
    if Path(name).is_dir():
        return Path(name)
    return fetched(name, request.download_dir, CONFIGURATION)


def pipeline_class(folder: Path) -> Any:
    """The class that a pipeline's index names.

    Raises:
        XditCompileError: the installed diffusers has none of that name.
    """
    import diffusers

    name = pipeline_index(folder)["_class_name"]
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise XditCompileError(f"the installed diffusers has no pipeline {name}; install a version that has it")
    return kind


def components(folder: Path, dtype: torch.dtype) -> tuple[dict[str, nn.Module], dict[str, Any]]:
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


def may_denoise(module: nn.Module) -> bool:
    """A model of diffusers that is no autoencoder."""
    from diffusers import ModelMixin

    return isinstance(module, ModelMixin) and not hasattr(module, "decode")


def stand_in(module: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters are zeros, each a single element in memory."""
    copied = copy.deepcopy(module)
    for child in copied.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(one_zero(parameter), requires_grad=False)
    return copied


class Unvalued(TorchDispatchMode):
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
        meta_args, meta_kwargs = on_device("meta", (args, kwargs))
        try:
            result = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError):
            return func(*args, **kwargs)
        if any(not value.is_floating_point() for value in tensors_of(result)):
            return func(*args, **kwargs)
        return pytree.tree_map_only(torch.Tensor, one_zero, result)


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


def one_zero(value: torch.Tensor) -> torch.Tensor:
    """Zeros of a tensor's shape and dtype on the CPU, a single element in memory."""
    return torch.zeros((), dtype=value.dtype).expand(value.shape)


def _is_large(args: Any, kwargs: Any) -> bool:
    return any(value.is_floating_point() and value.numel() > LARGE for value in tensors_of((args, kwargs)))


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """The tensors in nested containers."""
    return [value for value in pytree.tree_leaves(tree) if isinstance(value, torch.Tensor)]


def on_device(device: str, tree: Any) -> Any:
    """Nested containers with their tensors on a device."""
    return pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), tree)
