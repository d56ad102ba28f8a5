"""Compiles graphs with inductor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from xdit_compile.kernels.inductor_order import pin_order

from .base import Backend
from .sites import Sites

OPTIONS = {"emulate_precision_casts": True}
"""Round where the module does. Left free, inductor keeps more digits between fused operators: nearer to exact numbers,
but another picture. A time step of 0.7 in bfloat16, times 1000, is 700 by itself and 699.2 in a fused kernel."""


class Inductor(Backend):
    """Static shapes; every structure is compiled once for each form in which its tensors come.

    The graphs are functional and flat already, so they go to inductor as they are: ``torch.compile`` would check in
    every call of a structure what is known of the whole program, which took half of its host time.
    """

    name = "inductor"

    def unavailable(self) -> str | None:
        if torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++"))):
            return None
        return "it needs a C++ compiler on the CPU; install g++, or use backend='eager'"

    def compile(self, root: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
        """The root with every structure compiled when it is first called."""
        options = dict(OPTIONS)
        return Sites(root, lambda structure, args: _compiled(structure, args, options))


def _compiled(structure: fx.GraphModule, args: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    pin_order()
    mode = FakeTensorMode(shape_env=ShapeEnv())  # without one inductor does not look into its cache of compiled graphs
    fakes = [mode.from_tensor(arg, static_shapes=True) if isinstance(arg, torch.Tensor) else arg for arg in args]
    return torch._inductor.compile(structure, fakes, options=dict(options))  # type: ignore[no-any-return]
