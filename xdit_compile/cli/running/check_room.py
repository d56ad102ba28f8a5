"""Refuses a request that does not fit into memory, before anything is loaded, and says what would."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch

from xdit_compile.cli.options.request import PipelineRequest, Request
from xdit_compile.cli.processes.speech import set_logs
from xdit_compile.distributed.devices import accelerator
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError, one_line
from xdit_compile.ir.peak_memory import free_bytes
from xdit_compile.plan import Plan
from xdit_compile.plan.host import available_memory, free_on_cards
from xdit_compile.weights.model_folder import pixel_multiple

from .pipeline_call import placement, processes, weights_dtype
from .room import Counts, counted, gibibytes, need, to_load
from .stand_ins import configuration_folder

logger = logging.getLogger("xdit_compile")
SIZES = ("height", "width", "num_frames", "num_images_per_prompt")
SIDES = ("height", "width")
TRIES = 3
"""How often a smaller size is counted anew until it fits."""
STEP = 2**28
"""Bytes of which a budget for the autoencoder is a multiple."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where ranks of this machine compute, and the bytes that each of them may take.

    Args:
        device: its kind.
        free: on the device.
        ram: of this machine, for one rank.
        ranks: how many there are on this machine.
        more: how many cards there are for ranks.
    """

    device: torch.device
    free: int
    ram: int | None
    ranks: int
    more: int = 0

    def fits(self, counts: Counts, request: Request) -> bool:
        """Whether a request fits, on its device and in the memory from which that is filled."""
        if need(counts, request, self.device).total > self.free:
            return False
        return self.device.type == "cpu" or self.ram is None or to_load(counts, request) <= self.ram


def check_room(request: PipelineRequest, world: World, ranks: int, launches: bool) -> None:
    """Compare what a request takes with what is there. What cannot be counted or compared goes on.

    Args:
        ranks: processes on this machine.
        launches: whether they are started from here, so that this one computes nothing.

    Raises:
        UsageError: it does not fit; says by how much, and what would.
    """
    set_logs(request)
    place = _launched(request, ranks) if launches else _here(request, world, ranks)
    if place is None:
        return
    for each, where, prefix in _runs(request, place):
        try:
            counts = counted(each, weights_dtype(each))
        except XditCompileError as error:
            logger.debug("memory was not counted: %s", one_line(error))
            return
        if not where.fits(counts, each):
            raise UsageError(prefix + _said(each, counts, where))


def _launched(request: PipelineRequest, ranks: int) -> Place | None:
    """Where processes that are about to be started will compute; no card is touched for that."""
    kind, ram = accelerator(), available_memory(ranks)
    if request.device == "cpu" or kind is None:
        return None if ram is None else Place(torch.device("cpu"), ram, ram, ranks)
    cards = free_on_cards() if kind.type == "cuda" else []
    return Place(kind, min(cards[:ranks]), ram, ranks, len(cards)) if len(cards) >= ranks else None


def _here(request: PipelineRequest, world: World, ranks: int) -> Place | None:
    device, _ = placement(request, world)
    ram = available_memory(ranks)
    free = ram if device.type == "cpu" else free_bytes(device)
    if free is None:
        return None
    return Place(device, free, ram, ranks, 0 if device.type == "cpu" else torch.accelerator.device_count())


def _runs(request: PipelineRequest, place: Place) -> Iterator[tuple[Request, Place, str]]:
    """What is made one after the other, where, and how to say which it is."""
    whole = dataclasses.replace(request.plan, **_alone())
    if isinstance(request, Request):
        yield request, place, ""
        if request.compare and request.plan.world_size > 1:
            ram = None if place.ram is None else place.ram * place.ranks
            free = ram if place.device.type == "cpu" and ram is not None else place.free
            unsplit = dataclasses.replace(request, plan=whole)
            yield unsplit, dataclasses.replace(place, free=free, ram=ram, ranks=1), "--compare runs all on one rank: "
        return
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(PipelineRequest)}
    batch = Request.prompt * getattr(request, "batch_size", 1)
    yield Request(**{**fields, "plan": whole}, prompt=batch), place, "evaluate runs batches on each rank unsplit: "


def _alone() -> dict[str, Any]:
    """What of a plan is set back where one rank does all."""
    fields = {field.name: field.default for field in dataclasses.fields(Plan)}
    kept = {"backend", "compile_mode", "attention", "cache", "compile", "without", "timeout_s"}
    return {name: value for name, value in fields.items() if name not in kept}


def _said(request: Request, counts: Counts, place: Place) -> str:
    """Why a request does not fit, in one line."""
    asked = " ".join(f"--{name} {getattr(request, name)}" for name in SIZES if getattr(request, name) is not None)
    what, ways = asked or "this pipeline at its own size", " or ".join(_ways(request, counts, place))
    needed, cpu = need(counts, request, place.device), place.device.type == "cpu"
    if needed.total > place.free:
        each = "1 process" if place.ranks == 1 else f"each of {processes(place.ranks)}"
        free = f"{gibibytes(place.free)} of {'RAM' if cpu else 'the device'}"
        why = f"takes about {gibibytes(needed.total)} on {each} ({needed}), and {free} are free for it"
    else:
        ram = to_load(counts, request)
        why = f"takes about {gibibytes(ram)} of RAM a process to load, and {gibibytes(place.ram or 0)} are free for it"
    return f"{what} {why}; {f'take {ways}' if ways else 'take a smaller model or another machine'}, or --force"


def _ways(request: Request, counts: Counts, place: Place) -> Iterator[str]:
    """Flags with which the request would fit, by the same count."""
    smaller = _greatest(request, counts, place)
    if smaller is not None:
        yield f"at most {smaller}"
    for flags, plan, more in _other_plans(request, counts, place):
        other = dataclasses.replace(request, plan=plan, **more)
        if not other.plan.problems() and place.fits(counts, other):
            yield flags


def _other_plans(
    request: Request, counts: Counts, place: Place
) -> Iterator[tuple[str, Plan, dict[str, Any]]]:  # fmt: skip
    plan = request.plan
    if plan.world_size > 1 and plan.vae == "whole":
        yield "--use_parallel_vae", dataclasses.replace(plan, vae="patch"), {}
    left = place.free - need(counts, request, place.device).weights
    budget = max(left, 0) // 2 // STEP * STEP
    if plan.vae_memory is None and budget:
        flags = f"{'--use_parallel_vae ' if plan.vae == 'whole' else ''}--vae_memory {budget // 2**20}MiB"
        yield flags, dataclasses.replace(plan, vae="patch", vae_memory=budget), {}
    if place.device.type == "cpu":
        return
    if not request.enable_sequential_cpu_offload and plan.tensor == 1:
        yield "--enable_model_cpu_offload", plan, {"enable_model_cpu_offload": True}
    if plan.world_size == 1:
        for ranks in (2**power for power in range(1, int(math.log2(max(place.more, 1))) + 1)):
            split = dataclasses.replace(plan, ulysses=ranks, vae="patch")
            yield f"--nproc {ranks} --ulysses_degree {ranks} --use_parallel_vae", split, {}
            sliced = dataclasses.replace(plan, tensor=ranks, vae="patch")
            yield f"--nproc {ranks} --tensor_parallel_degree {ranks} --use_parallel_vae", sliced, {}


def _greatest(request: Request, counts: Counts, place: Place) -> str | None:
    """The flags of the greatest size of the same form that fits; None where none does, or no size was asked for."""
    sides = {name: value for name in SIDES if (value := getattr(request, name)) is not None}
    needed = need(counts, request, place.device)
    room = place.free - needed.weights - needed.process
    if not sides or room <= 0:
        return None
    multiple = pixel_multiple(configuration_folder(request)) or 16
    scale = room / max(needed.denoiser, needed.autoencoder, 1)
    for _ in range(TRIES):
        fewer = _scaled(sides, scale, multiple)
        if min(fewer.values()) < multiple:
            return None
        smaller = dataclasses.replace(request, **fewer)
        if place.fits(counted(smaller, weights_dtype(smaller)), smaller):
            return " ".join(f"--{name} {value}" for name, value in fewer.items())
        scale *= 0.9
    return None


def _scaled(sides: dict[str, int], scale: float, multiple: int) -> dict[str, Any]:
    """Sides of so many times the area, as multiples."""
    factor = scale ** (1 / len(sides))
    return {name: int(value * factor) // multiple * multiple for name, value in sides.items()}
