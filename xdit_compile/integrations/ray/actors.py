"""Ranks as actors: each a process of its own, on whatever machine there is room, that knows its place."""

from __future__ import annotations

import collections
import dataclasses
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from xdit_compile.distributed.environment import RUN_FOLDER
from xdit_compile.distributed.world import LAUNCHERS
from xdit_compile.errors import XditCompileError, one_line
from xdit_compile.plan import Plan
from xdit_compile.plan.host import available_memory, free_on_cards
from xdit_compile.serving.queue.starters import free_port
from xdit_compile.serving.room import Free

from .placing import Share

HANDED_ON = ("XDIT_COMPILE_", "HF_", "TORCH_", "TORCHINDUCTOR_", "TRITON_", "NCCL_", "GLOO_", "PYTORCH_")
"""Settings in this process's environment that ranks have, too, by how their names begin."""
KEPT_BACK = ("XDIT_COMPILE_API_KEY", RUN_FOLDER, *(name for names in LAUNCHERS for name in names))


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a call: those by place, and those by name."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call gave, pickled, or what it raised."""

    pickled: bytes = b""
    error: Exception | None = None

    @property
    def value(self) -> Any:
        """What it gave."""
        return cloudpickle.loads(self.pickled)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an actor is.

    Args:
        node: Ray's id of the machine.
        address: of the machine.
        port: that was free there.
        memory: bytes of RAM that were free there; None where nobody says.
        card: the same of the actor's GPU; None where it has none.
    """

    node: str
    address: str
    port: int
    memory: int | None
    card: int | None


class RankActor:
    """One rank."""

    _pipe: Any = None

    def place(self) -> Place:
        """Where this is."""
        card = next(iter(free_on_cards()), None) if ray.get_gpu_ids() else None
        node = ray.get_runtime_context().get_node_id()
        return Place(node, ray.util.get_node_ip_address(), free_port(""), available_memory(), card)

    def settle(self, environment: dict[str, str]) -> None:
        """Know the place among the ranks, where launchers write it."""
        os.environ.update(environment)

    def run(self, function: Callable[..., Any], call: Arguments) -> Outcome:
        """What a function gives in this process."""
        return _outcome(lambda: function(*call[0], **call[1]))

    def load(self, load: Callable[..., Any], plan: Plan, call: Arguments) -> Outcome:
        """Have a pipeline, parallelized."""

        def loaded() -> None:
            from xdit_compile.api import parallelize

            self._pipe = parallelize(load(*call[0], **call[1]), plan)

        return _outcome(loaded)

    def make(self, call: Arguments) -> Outcome:
        """What its call gives; on rank 0 alone."""

        def made() -> Any:
            result = self._pipe(*call[0], **call[1])
            return result if os.environ["RANK"] == "0" else None

        return _outcome(made)


def _outcome(call: Callable[[], Any]) -> Outcome:
    """What a call gives or raises, as what another process can read."""
    try:
        value = call()
    except Exception as error:  # noqa: BLE001 - it is raised where the call was asked for
        error.add_note(traceback.format_exc())
        return Outcome(error=error if _travels(error) else XditCompileError(f"{type(error).__name__}: {error}"))
    try:
        return Outcome(cloudpickle.dumps(value))
    except Exception:  # noqa: BLE001 - whatever a class does when it is copied
        return Outcome(error=TypeError(f"a {type(value).__name__} cannot be sent from an actor; return plain data"))


def _travels(error: Exception) -> bool:
    """Whether another process can read it: one that is made of other things than it keeps cannot be."""
    try:
        return type(cloudpickle.loads(cloudpickle.dumps(error))) is type(error)
    except Exception:  # noqa: BLE001 - whatever a class does when it is copied
        return False


@dataclasses.dataclass(frozen=True)
class Actors:
    """Ranks.

    Args:
        handles: in their order.
        free: what each of them had at least when it came.
    """

    handles: list[ActorHandle]
    free: Free


def actors_in(group: PlacementGroup, share: Share, settings: Mapping[str, str], limit_s: float) -> Actors:
    """Actors in all of a placement group, in the order of their ranks, those of a machine side by side.

    Args:
        settings: for their environments; they have imported nothing heavy then.

    Raises:
        XditCompileError: they were not there in time.
    """
    kind: Any = ray.remote(RankActor)
    started = [
        kind.options(
            **share.options, max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
        ).remote()
        for number in range(group.bundle_count)
    ]  # fmt: skip
    try:
        places = ray.get([actor.place.remote() for actor in started], timeout=limit_s)
        nodes = list(dict.fromkeys(place.node for place in places))
        order = sorted(range(len(started)), key=lambda number: nodes.index(places[number].node))
        handles, places = [started[number] for number in order], [places[number] for number in order]
        told = zip(handles, _environments(places), strict=True)
        ray.get([handle.settle.remote({**settings, **each}) for handle, each in told], timeout=limit_s)
    except GetTimeoutError:
        end_actors(started)
        raise XditCompileError(f"the cluster did not start {len(started)} actors within {limit_s:.0f} s") from None
    except RayError as error:
        end_actors(started)
        raise XditCompileError(f"an actor could not be started: {said_of(error)}") from error
    return Actors(handles, _least_free(places))


def end_actors(actors: Sequence[ActorHandle]) -> None:
    """End the processes at once, whatever they do."""
    for actor in actors:
        ray.kill(actor)


def said_of(error: BaseException) -> str:
    """What to say of an actor's failure, in one line."""
    if isinstance(error, RayTaskError):
        return one_line(error.cause)
    if isinstance(error, RayActorError):
        return "its machine was lost" if "node has died" in str(error) else "its actor died"
    return one_line(error)


def _least_free(places: Sequence[Place]) -> Free:
    """What every rank has at least, of its card where each has one; those of a machine share its memory."""
    on_cards = all(place.card is not None for place in places)
    ranks = collections.Counter(place.node for place in places)
    shares = [
        place.card if on_cards else None if place.memory is None else place.memory // ranks[place.node]
        for place in places
    ]
    known = [share for share in shares if share is not None]
    return Free(min(known) if len(known) == len(shares) else None, on_cards)


def _environments(places: Sequence[Place]) -> list[dict[str, str]]:
    """What a launcher would write for each rank."""
    environments = []
    for rank, place in enumerate(places):
        alike = [number for number, other in enumerate(places) if other.node == place.node]
        values = {
            "RANK": rank, "WORLD_SIZE": len(places), "LOCAL_RANK": alike.index(rank), "LOCAL_WORLD_SIZE": len(alike),
            "MASTER_ADDR": places[0].address, "MASTER_PORT": places[0].port,
        }  # fmt: skip
        environments.append({name: str(value) for name, value in values.items()})
    return environments


def settings_here(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What of a process's environment its ranks elsewhere have, too."""
    handed_on = {
        name: value for name, value in environment.items() if name.startswith(HANDED_ON) and name not in KEPT_BACK
    }
    return {"TORCH_CPP_LOG_LEVEL": "ERROR", **handed_on}
