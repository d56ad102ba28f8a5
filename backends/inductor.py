"""Compiles graphs with inductor."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from xdit_compile.errors import UsageError
from xdit_compile.plan.backend_options import GRAPHS
from xdit_compile.plan.plan import GRAPH_MODES

from .base import Backend
from .codes import Codes
from .recorded import CudaGraphs, RecordedSites
from .sites import Sites
from .target.cards import Card
from .target.on_card import on_card
from .target.pretend_card import UNTIMED

OPTIONS = {"emulate_precision_casts": True, "comprehensive_padding": False}
"""Round where the module does. Left free, inductor keeps more digits between fused operators: nearer to exact numbers,
but another picture. A time step of 0.7 in bfloat16, times 1000, is 700 by itself and 699.2 in a fused kernel.

And no strides but those of the shape: where inductor of torch 2.11 pads them for a card, a product can read queries in
another order than the kernel before it wrote them, if tokens times the size of a head is no multiple of 32."""


class Inductor(Backend):
    """Static shapes; every structure is compiled once for each form in which its tensors come.

    The graphs are functional and flat already, so they go to inductor as they are: ``torch.compile`` would check in
    every call of a structure what is known of the whole program, which took half of its host time.

    Inductor's own CUDA graphs are left out whatever the mode; `RecordedSites` has what is done in their place.

    Args:
        mode: a mode of ``torch.compile``.
        card: what is compiled for, where that is not there.
        options: more of its settings, by their full names; they come before those of the mode.
    """

    name = "inductor"

    def __init__(self, mode: str = "default", card: Card | None = None, options: Mapping[str, Any] | None = None):
        self._mode, self._card, self._more = mode, card, {**(options or {})}
        self._records = self._more.pop(GRAPHS, mode in GRAPH_MODES)
        self.codes: Codes = Codes(self._options, card=card)

    def unavailable(self) -> str | None:
        if self._records and self._mode != "max-autotune" and not torch.cuda.is_available():
            of_mode = self._mode in GRAPH_MODES
            asked = f"compile_mode={self._mode!r}" if of_mode else f"backend_options[{GRAPHS!r}]"
            instead = "take compile_mode='default'" if of_mode else "leave it out"
            return f"{asked} records CUDA graphs, and there is no CUDA device here; {instead}"
        if torch.cuda.is_available() or any(map(shutil.which, ("c++", "g++", "clang++"))):
            return None
        return "it needs a C++ compiler on the CPU; install g++, or use backend='eager'"

    def for_card(self, card: Card) -> Inductor:
        if self._mode != "default":
            raise UsageError(f"compile_mode={self._mode!r} works on the card itself; for {card.target} use 'default'")
        return Inductor(card=card, options=self._more)

    def prepare(self) -> None:
        import torch._inductor.codegen.memory_planning
        import torch._inductor.select_algorithm
        import torch._inductor.standalone_compile  # noqa: F401

    def compile(self, root: fx.GraphModule) -> Sites:
        """The root with every structure compiled when it is first called, or found among those that are."""
        if self._records and self._card is None and torch.cuda.is_available():
            return RecordedSites(root, self.codes.run_of, self._graphs)
        return Sites(root if self._card is None else on_card(root), self.codes.run_of)

    @functools.cached_property
    def _graphs(self) -> CudaGraphs:
        return CudaGraphs()

    def _options(self) -> dict[str, Any]:
        if self._card is not None:
            return {**OPTIONS, **self._more, **UNTIMED}
        listed: Mapping[str, Any] = torch._inductor.list_mode_options(self._mode)
        of_mode = {name: value for name, value in listed.items() if name != GRAPHS}
        threads, options = compile_threads(), {**of_mode, **OPTIONS, **self._more}
        return options if threads is None else {**options, "compile_threads": threads}


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
