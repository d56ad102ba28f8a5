"""Ranks join one process group and tell each other which card each computes on, before any of them uses it."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import logging
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist

from xdit_compile.errors import AgreementError, UsageError
from xdit_compile.plan import Plan

from .devices import ADVICE, VISIBLE, backend_for
from .liveness import QUIET_SECONDS, Liveness, Signs
from .mesh import backends, first_sentence
from .watchdog import lenient
from .world import World

ALONE_ON_A_CARD = frozenset({"nccl"})
"""Backends that refuse two ranks on one card, or wait for ever."""
COMING = "xdit_compile/coming"
"""Begins the keys of what ranks say before they have a session."""
LIFE = "life"
POLL_SECONDS = 0.02
logger = logging.getLogger("xdit_compile.peers")
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
        store = meet(world, plan.timeout_s)
        with lenient():
            dist.init_process_group(backend_for(device), timeout=limit, rank=world.rank, world_size=world.size)
        del store  # rank 0 serves it: others may read there until they are in the group, whose store is served, too


def meet(world: World, limit_s: float) -> dist.Store:
    """The store through which ranks find one another, once all have come to it; they need no process group for that.

    Raises:
        AgreementError: one did not come in time.
    """
    limit = datetime.timedelta(seconds=limit_s)
    try:
        store, rank, size = next(dist.rendezvous("env://", world.rank, world.size, timeout=limit))
    except RuntimeError as error:
        raise AgreementError(
            f"rank {world.rank} found none of the other ranks within {limit_s:g} s ({first_sentence(error)}); look at "
            "the first one that failed, and start all processes again"
        ) from error
    store = dist.PrefixStore(COMING, store)
    store.set(f"here/{rank}", "")
    _wait_for(store, Signs(store, LIFE), {each: f"here/{each}" for each in range(size)}, "the start", limit_s)
    return store


@contextmanager
def coming(world: World, limit_s: float, what: str) -> Iterator[None]:
    """Say meanwhile that this rank runs and does something that takes as long as it takes, for those that wait.

    Raises:
        AgreementError: a rank did not come to meet the others in time.
    """
    if not world.launched or world.size == 1:
        yield
        return
    world.check_meeting()
    life = Liveness(meet(world, limit_s), LIFE, world.rank)
    life.do(what, busy=True)
    try:
        yield
    finally:
        life.close()


def _wait_for(store: dist.Store, signs: Signs, keys: Mapping[int, str], what: str, limit_s: float) -> None:
    """Return once ranks have left their keys in a store: those that give signs of life meanwhile take their time.

    Args:
        keys: by rank.
        what: they come to.
    """
    begin = time.monotonic()
    for rank, key in keys.items():
        since, told = begin, False
        while not store.check([key]):
            doing, busy = signs.does(rank)
            since = time.monotonic() - signs.silence(rank) if busy else since
            waited = time.monotonic() - since
            silent = f"gives no sign of life and was last seen {doing}" if busy else "is not here"
            where = f"rank {rank} {silent}"
            if waited == math.inf:
                raise AgreementError(
                    f"rank {rank} ended before it came to {what}; it was last seen {doing}; look at what it printed, "
                    "and start all processes again"
                )
            if waited > limit_s:
                raise AgreementError(
                    f"{where}: it did not come to {what} within {limit_s:g} s; look at what it printed, and start all "
                    "processes again"
                )
            if waited > QUIET_SECONDS and not told:
                told = True
                if signs.store.add(f"told/{rank}/{what}", 1) == 1:
                    logger.warning("%s: all ranks wait for it to come to %s, for %.0f s so far, and end after %.0f s",
                                   where, what, waited, limit_s)  # fmt: skip
            time.sleep(POLL_SECONDS)


def compare_seats(mine: Seat, store: dist.Store, rank: int, size: int, limit_s: float) -> None:
    """Return once every rank has said where it computes, and each can.

    Raises:
        UsageError: one cannot; on every rank the same.
        AgreementError: one did not say in time.
    """
    times = store.add(f"xdit_compile/seats/{rank}", 1)
    keys = [f"xdit_compile/seats/{rank}/{times}" for rank in range(size)]
    store.set(keys[rank], json.dumps(dataclasses.asdict(mine)))
    below = getattr(store, "underlying_store", store)
    _wait_for(store, Signs(dist.PrefixStore(COMING, below), LIFE), dict(enumerate(keys)), "parallelize", limit_s)
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
