"""Ranks join one process group and tell each other which card each computes on, before any of them uses it."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import socket
from collections.abc import Mapping

import torch
import torch.distributed as dist

from xdit_compile.errors import AgreementError, UsageError
from xdit_compile.plan import Plan

from .devices import ADVICE, VISIBLE, backend_for
from .mesh import backends, first_sentence
from .watchdog import lenient
from .world import World

ALONE_ON_A_CARD = frozenset({"nccl"})
"""Backends that refuse two ranks on one card, or wait for ever."""
IDENTITY = ("uuid", "pci_domain_id", "pci_bus_id", "pci_device_id")


@dataclasses.dataclass(frozen=True)
class Seat:
    """Where a rank computes.

    Args:
        device: by its name in this process.
        card: what tells it from all other cards.
        backend: what the process group sends from there with.
        problem: why the rank cannot compute there, in one line.
    """

    device: str
    card: str
    backend: str
    problem: str

    @classmethod
    def of(cls, device: torch.device, problem: str) -> Seat:
        """This rank's seat in the default process group."""
        card = "" if problem else card_of(device)
        return cls(str(device), card, backends().get(device.type, "gloo"), problem)


def card_of(device: torch.device, environment: Mapping[str, str] = os.environ) -> str:
    """The host and the card that a device stands for, whatever its index in this process."""
    if device.type == "cpu":
        return socket.gethostname()
    properties = getattr(torch.get_device_module(device.type), "get_device_properties", lambda index: None)(
        device.index
    )
    known = [str(getattr(properties, name)) for name in IDENTITY if hasattr(properties, name)]
    shown = next((environment[name].split(",") for name in VISIBLE if environment.get(name)), [])
    index = device.index or 0
    entry = shown[index] if index < len(shown) else str(index)
    return " ".join([socket.gethostname(), *(known or [entry.strip()])])


def join(plan: Plan, device: torch.device, world: World) -> None:
    """Make the default process group, where a launcher started this process and nobody made it.

    Args:
        device: that this rank computes on, and the current one.

    Raises:
        UsageError: nothing says where ranks meet.
    """
    plan.check(dist.get_world_size() if dist.is_initialized() else world.size)
    if not dist.is_initialized() and world.launched and world.size > 1:
        world.check_meeting()
        limit = datetime.timedelta(seconds=plan.timeout_s)
        with lenient():
            dist.init_process_group(backend_for(device), timeout=limit, rank=world.rank, world_size=world.size)


def compare_seats(mine: Seat, store: dist.Store, rank: int, size: int, limit_s: float) -> None:
    """Return once every rank has said where it computes, and each can.

    Raises:
        UsageError: one cannot; on every rank the same.
        AgreementError: one did not say in time.
    """
    times = store.add(f"xdit_compile/seats/{rank}", 1)
    keys = [f"xdit_compile/seats/{rank}/{times}" for rank in range(size)]
    store.set(keys[rank], json.dumps(dataclasses.asdict(mine)))
    try:
        store.wait(keys, datetime.timedelta(seconds=limit_s))
    except RuntimeError as error:
        raise AgreementError(
            f"not all of {size} ranks came to parallelize within {limit_s:g} s ({first_sentence(error)}); look at the "
            "first one that failed, and start all processes again"
        ) from error
    problem = problem_of([Seat(**json.loads(store.get(key))) for key in keys])
    if problem is not None:
        raise UsageError(problem)


def problem_of(seats: list[Seat]) -> str | None:
    """Why ranks, in order, cannot compute where they sit."""
    wrong = next((rank for rank, seat in enumerate(seats) if seat.problem), None)
    if wrong is not None:
        return f"rank {wrong}: {seats[wrong].problem}"
    first = torch.device(seats[0].device).type
    for rank, seat in enumerate(seats):
        if torch.device(seat.device).type != first:
            return f"rank 0 computes on {seats[0].device} and rank {rank} on {seat.device}, of another kind; {ADVICE}"
    for (one, seat), (other, their) in itertools.combinations(enumerate(seats), 2):
        if seat.card == their.card and first != "cpu" and seat.backend in ALONE_ON_A_CARD:
            return (
                f"ranks {one} and {other} compute on one card ({their.device} of rank {other}, {their.card}), which "
                f"{seat.backend} cannot: start as many processes as there are cards, and {ADVICE}"
            )
    return None
