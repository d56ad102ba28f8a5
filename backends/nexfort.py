"""Compiles graphs with nexfort, through onediff."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from xdit_compile.plan.nexfort_versions import OTHERWISE, why_not
from xdit_compile.plan.packages import version_of

from .base import ByStructure

MODE = {"mode": "max-optimize:max-autotune:low-precision"}


class Nexfort(ByStructure):
    """onediff's nexfort compiler for CUDA devices.

    Args:
        options: handed to it through onediff; ``mode`` is its own unless it is among them.
    """

    name = "nexfort"

    def __init__(self, options: Mapping[str, Any] | None = None):
        self._options = {**MODE, **(options or {})}

    def unavailable(self) -> str | None:
        reason = why_not()
        if reason is None and not torch.cuda.is_available():
            version = version_of("nexfort")
            return f"nexfort {version} compiles for CUDA alone, and there is no CUDA device here; {OTHERWISE}"
        return reason

    def compile_structure(self, structure: fx.GraphModule) -> nn.Module:
        """What onediff's backend of that name makes of a structure."""
        from onediff.infer_compiler import compile as onediff_compile

        compiled: nn.Module = onediff_compile(structure, backend="nexfort", options=dict(self._options))
        return compiled
