"""Components of a pipeline folder built from their configurations, with parameters on the meta device."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn


def component_class(library: str, name: str) -> Any:
    """The class that a pipeline's index names."""
    import diffusers

    package = getattr(diffusers.pipelines, library, None) or importlib.import_module(library)
    return getattr(package, name)


def empty_module(kind: Any, folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """One component in evaluation mode; buffers are real, parameters are not there.

    Parameters are of ``dtype`` but for those that the class keeps in float32.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if hasattr(kind, "load_config"):
            module = kind.from_config(kind.load_config(str(folder), subfolder=name))
        else:
            module = kind(kind.config_class.from_pretrained(str(folder), subfolder=name))
    kept = getattr(kind, "_keep_in_fp32_modules", None) or []
    kept = [kept] if isinstance(kept, str) else kept
    for path, child in module.named_modules():
        for parameter_name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                wide = any(part in kept for part in [*path.split("."), parameter_name])
                cast = parameter.detach().to(torch.float32 if wide else dtype)
                child._parameters[parameter_name] = nn.Parameter(cast, requires_grad=False)
    return module.eval()
