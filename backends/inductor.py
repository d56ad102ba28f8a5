"""Compiles graphs with torch.compile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
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
        threads, options = compile_threads(), dict[str, Any](OPTIONS)
        if threads is not None:
            options["compile_threads"] = threads
        compiled: Any = torch.compile(structure, backend="inductor", fullgraph=True, dynamic=False, options=options)
        return Compiled(compiled.forward)


class Compiled(nn.Module):
    """A structure compiled anew for each way in which its inputs lie.

    Dynamo takes a ninth way for a mistake and, as graphs may not break, raises before anything ran. Here every way
    comes of a call that the program makes, so there is no limit but the one on all that is compiled of a function.
    """

    def __init__(self, run: Callable[..., tuple[Any, ...]]):
        super().__init__()
        self._run, self._many = run, False

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
        if not self._many:
            try:
                return self._run(*tensors)
            except torch._dynamo.exc.FailOnRecompileLimitHit:
                self._many = True
        config = torch._dynamo.config
        with config.patch(recompile_limit=config.accumulated_recompile_limit):
            return self._run(*tensors)


def compile_threads(environment: Mapping[str, str] = os.environ) -> int | None:
    """This rank's part of the processors for workers that compile; None where the user has chosen a number.

    Left to itself every rank takes all of them, up to 32.
    """
    from torch._inductor import config

    if "TORCHINDUCTOR_COMPILE_THREADS" in environment or config.compile_threads != config.decide_compile_threads():
        return None
    here = environment.get("LOCAL_WORLD_SIZE", "")
    ranks = int(here) if here.isdecimal() else dist.get_world_size() if dist.is_initialized() else 1
    return max(1, min(config.compile_threads, len(os.sched_getaffinity(0)) // max(1, ranks)))
