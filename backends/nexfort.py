"""Compiles graphs with nexfort, through onediff."""

from __future__ import annotations

import importlib.util

from torch import fx, nn

from .base import ByStructure


class Nexfort(ByStructure):
    """onediff's nexfort compiler for CUDA devices."""

    name = "nexfort"

    def unavailable(self) -> str | None:
        missing = [name for name in ("onediff", "nexfort") if importlib.util.find_spec(name) is None]
        if not missing:
            return None
        return (
            f"{' and '.join(missing)} not installed; `pip install xdit-compile[onediff]` brings onediff, nexfort for "
            "CUDA from https://github.com/siliconflow/onediff (src/onediff/infer_compiler/backends/nexfort)"
        )

    def compile_structure(self, structure: fx.GraphModule) -> nn.Module:
        from onediff.infer_compiler import compile as onediff_compile

        return onediff_compile(
            structure, backend="nexfort", options={"mode": "max-optimize:max-autotune:low-precision"}
        )
