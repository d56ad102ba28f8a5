"""Makes the graphs of all ranks ahead of time, in one process and without weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.backends.registry import backend_of
from xdit_compile.backends.target.cards import Card
from xdit_compile.backends.target.pretend_card import check_versions
from xdit_compile.cache.bundle import pack
from xdit_compile.cache.environment import environment, environment_of_target
from xdit_compile.cache.store import Store, open_store
from xdit_compile.cli.options.request import Request
from xdit_compile.cli.processes.speech import set_logs, show_phases
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError
from xdit_compile.plan import Plan

from .explain import denoiser_call
from .pipeline_call import placement


def build(request: Request, sizes: Sequence[tuple[int, int] | None], batches: Sequence[int], plans: Sequence[Plan],
          output: Path | None, card: Card | None = None) -> list[str]:  # fmt: skip
    """Keep what every rank runs, for every size, batch and plan.

    Args:
        request: the model, the prompt and the dtype.
        sizes: heights and widths in pixels; None for the pipeline's own.
        batches: numbers of prompts in one call.
        output: a file that all of it is packed into, for other machines.
        card: what it is for, on a machine without one; None for a device of this machine.

    Returns:
        Lines that say what was made.

    Raises:
        UsageError: nothing can be kept, the file cannot be written, or nothing can be compiled for the card here.
        XditCompileError: the model cannot be built, or a plan cannot be done with it.
    """
    from xdit_compile.runtime.methods.ahead import build_ahead

    shown = show_phases(request, World())
    set_logs(request)
    if card is not None:
        check_versions()
        for plan in plans:
            backend_of(plan).for_card(card)
        request = dataclasses.replace(request, device="cpu", dtype=_dtype_on_card(request.dtype))
    store = open_store(plans[0].cache)
    if store is None:
        raise UsageError("there is nowhere to keep graphs: give --cache_dir, or leave out --no_cache")
    before = len(store.listed())
    device, _ = placement(request, World(rank=0, size=1))
    lines, done = [], itertools.count(1)
    total = len(sizes) * len(batches) * sum(plan.world_size for plan in plans)
    for size, batch in [(size, batch) for size in sizes for batch in batches]:

        def advance(rank: int, text: str = said(size, batch)) -> None:
            if (number := next(done)) < total:
                shown.begin(f"{text}: building graphs of rank {number + 1} of {total}", total, number)

        shown.begin(f"{said(size, batch)}: building the model without weights")
        call = denoiser_call(of_size(request, size, batch), device=device.type)
        module, args, kwargs = without_values(call.module, call.args, call.kwargs, device)
        shown.begin(f"{said(size, batch)}: building graphs", total)
        for plan in plans:
            there = build_ahead(module, call.name, args, kwargs, plan, store, advance, card)
            known = f", {there} of them there already" if there else ""
            lines.append(f"{said(size, batch)}, {_degrees(plan)}: {_ranks(plan)}{known}")
    shown.over()
    lines.append(f"{len(store.listed()) - before} new entries in {store.folder}")
    if output is not None:
        made_for = environment(device) if card is None else environment_of_target(card.target)
        lines.append(_packed(store, output, made_for))
    return lines


def of_size(request: Request, size: tuple[int, int] | None, batch: int) -> Request:
    """A request for pictures of a height and width in pixels, the pipeline's own for None, and so many prompts."""
    height, width = size or (request.height, request.width)
    return dataclasses.replace(request, height=height, width=width, prompt=request.prompt[:1] * batch)


def without_values(
    module: nn.Module, args: tuple, kwargs: dict, device: torch.device
) -> tuple[nn.Module, tuple, dict]:  # fmt: skip
    """The module with parameters of whatever values on its device, and inputs there, laid out as in a real call."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                child._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else buffer.to(device)
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, (args, kwargs))
    return module, args, kwargs


def _dtype_on_card(dtype: str) -> str:
    """What runs with weights on a card take where no dtype is asked for."""
    return "bfloat16" if dtype == "auto" else dtype


def _packed(store: Store, output: Path, made_for: dict[str, Any]) -> str:
    try:
        digest = pack(store, output, made_for)
    except OSError as error:
        raise XditCompileError(f"--output {output} cannot be written: {error.strerror}") from error
    return f"wrote {output}; take it in elsewhere with: xdit-compile cache unpack {output} --digest {digest}"


def said(size: tuple[int, int] | None, batch: int) -> str:
    """A size and a number of prompts in words."""
    of_size = "the pipeline's own size" if size is None else f"{size[0]} x {size[1]} pixels"
    return f"{of_size}, {batch} prompt{'s' if batch > 1 else ''}"


def _ranks(plan: Plan) -> str:
    return "1 rank" if plan.world_size == 1 else f"{plan.world_size} ranks"


def _degrees(plan: Plan) -> str:
    return " ".join(f"{name} {getattr(plan, name)}" for name in plan.used) or "one process"
