"""Compiles graphs with torch.compile."""

from __future__ import annotations

import shutil

import torch
from torch import fx, nn

from xdit_compile.kernels.inductor_order import pin_order

from .base import Backend

OPTIONS = {"emulate_precision_casts": True}
"""Round where the module does. Left free, inductor keeps more digits between fused operators: nearer to exact numbers,
but another picture. A time step of 0.7 in bfloat16, times 1000, is 700 by itself and 699.2 in a fused kernel."""


class Inductor(Backend):
    """Full-graph, static shapes: one compilation for each structure, and an error where a graph would break."""

    name = "inductor"

    def unavailable(self) -> str | None:
        if torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++"))):
            return None
        return "it needs a C++ compiler on the CPU; install g++, or use backend='eager'"

    def compile_structure(self, structure: fx.GraphModule) -> nn.Module:
        pin_order()
        return torch.compile(  # type: ignore[return-value]
            structure, backend="inductor", fullgraph=True, dynamic=False, options=dict(OPTIONS)
        )
