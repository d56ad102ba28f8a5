"""Loads a pipeline of which every rank reads only its part of the denoisers' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdit_compile.distributed.devices import resolve
from xdit_compile.errors import UsageError, one_line
from xdit_compile.plan import Plan
from xdit_compile.plan.log_level import set_log_level
from xdit_compile.plan.plan import as_plan
from xdit_compile.runtime.diffusers_pipeline import is_denoiser
from xdit_compile.weights.checkpoint import Checkpoint
from xdit_compile.weights.meta_module import component_class, empty_module
from xdit_compile.weights.model_folder import pipeline_index
from xdit_compile.weights.weights import Weights

from . import attach

HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "trust_remote_code")
OWN_PLACEMENT = ("device_map", "quantization_config", "max_memory")


def from_pretrained(
    path: str | Path, plan: Plan | None = None, *, device: torch.device | str = "cpu", **diffusers_kwargs: Any
) -> Any:
    """Load a diffusers pipeline and parallelize it; of split weights each rank reads its slices alone.

    The denoisers are built on the meta device. Which slices a rank needs is known at the first call, from its captured
    graph, and only then are they read from the safetensors files; names, shapes and lengths of the files are checked
    here. There is no whole module to compare the first call with, so ``plan.verify`` has no effect.

    Args:
        path: a pipeline's folder, or its name on the hub, which is downloaded first.
        plan: as for ``parallelize``.
        device: where to put the pipeline; an accelerator without an index is this rank's, as `local_device` says.
        diffusers_kwargs: as for ``DiffusionPipeline.from_pretrained``: ``torch_dtype``, ``variant``, components, ...

    Raises:
        UsageError: no such folder, no safetensors, a file that is missing, cut short or of other shapes, or an argument
            that places weights in a way of its own.
        PlanError: with every problem of the plan.
    """
    from diffusers import DiffusionPipeline

    set_log_level()
    plan = as_plan(plan)
    if refused := [name for name in OWN_PLACEMENT if diffusers_kwargs.get(name) is not None]:
        raise UsageError(f"{', '.join(refused)} cannot go together with reading slices; use parallelize instead")
    device = resolve(device)
    folder = _folder(path, diffusers_kwargs)
    weights = {
        name: _weights(folder, name, kind, diffusers_kwargs, device)
        for name, kind in _denoisers(folder).items()
        if name not in diffusers_kwargs
    }
    modules = {name: own.module for name, own in weights.items()}
    pipe = DiffusionPipeline.from_pretrained(str(folder), **{**diffusers_kwargs, **modules})
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and name not in modules:
            component.to(device)
    return attach(pipe, plan, weights)


def _denoisers(folder: Path) -> dict[str, Any]:
    """Class of each denoiser that a pipeline's folder holds."""
    return {
        name: component_class(*entry[:2])
        for name, entry in pipeline_index(folder).items()
        if is_denoiser(name) and isinstance(entry, list | tuple) and entry[0] is not None
    }


def _weights(folder: Path, name: str, kind: Any, diffusers_kwargs: dict[str, Any], device: torch.device) -> Weights:
    """An empty denoiser with its buffers, and where the rest is read."""
    checkpoint = Checkpoint(folder / name, diffusers_kwargs.get("variant"))
    dtype = _dtype(name, diffusers_kwargs)
    module = empty_module(kind, folder, name, dtype)
    stored = module.state_dict()
    checkpoint.check({key: value.shape for key, value in stored.items()})
    for path, child in module.named_modules():
        for buffer_name, buffer in child._buffers.items():
            if buffer is not None:
                key = f"{path}.{buffer_name}" if path else buffer_name
                child._buffers[buffer_name] = (
                    _stored(checkpoint, key, dtype).to(device) if key in stored else buffer.to(device)
                )
    weights = Weights(module, checkpoint, device)
    weights.load_first()
    return weights


def _stored(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    value = checkpoint.read(name)
    return value.to(dtype) if value.is_floating_point() else value


def _dtype(name: str, diffusers_kwargs: dict[str, Any]) -> torch.dtype:
    asked = diffusers_kwargs.get("dtype", diffusers_kwargs.get("torch_dtype"))
    if isinstance(asked, dict):
        asked = asked.get(name, asked.get("default"))
    return asked or torch.float32


def _folder(path: str | Path, diffusers_kwargs: dict[str, Any]) -> Path:
    from diffusers import DiffusionPipeline

    folder = Path(path)
    if not folder.is_dir():
        asked = {name: diffusers_kwargs[name] for name in (*HUB, "variant") if name in diffusers_kwargs}
        try:
            folder = Path(DiffusionPipeline.download(str(path), **asked))
        except Exception as error:
            raise UsageError(f"{path} is no folder and cannot be fetched: {one_line(error)}") from error
    if not (folder / "model_index.json").is_file():
        raise UsageError(f"{folder} is no pipeline: it has no model_index.json")
    return folder
