"""The ranks of a server as actors, in the placement group of the replica that tells them what to do."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from xdit_compile.distributed.world import World
from xdit_compile.serving.queue.starters import Child
from xdit_compile.serving.request import ServeRequest
from xdit_compile.serving.room import Free

from .actors import actors_in, end_actors, said_of
from .placing import Share

PLACED_S = 60.0
"""Actors are there within so long, in room that is theirs, or where a machine was lost, on another one."""
GONE_S = 10.0


class ActorStarter:
    """Starts ranks as actors, once.

    Args:
        request: what the server was started with.
        group: their room.
        share: what each takes of it.
        settings: for their environments.

    Attributes:
        free: what each had at least before it loaded anything.
    """

    may_restart = True
    free = Free(None)

    def __init__(self, request: ServeRequest, group: PlacementGroup, share: Share, settings: Mapping[str, str]):
        self.host: str | None = ray.util.get_node_ip_address()
        self._request, self._group, self._share, self._settings = request, group, share, settings

    def start(self, ranks: int, front: dict[str, Any]) -> list[Child]:
        """As `Starter.start`.

        Raises:
            XditCompileError: the actors were not there in time.
        """
        actors = actors_in(self._group, self._share, self._settings, PLACED_S)
        self.free = actors.free
        told, text = {**front, "is_told": True}, self._request.to_json()
        return [ActorChild(actor, actor.run.remote(_be_rank, ((text, told), {}))) for actor in actors.handles]

    def close(self) -> None:
        """As `Starter.close`: the room is the replica's."""


class ActorChild:
    """A rank as an actor.

    Args:
        actor: it.
        running: what it is at, until the front hangs up.
    """

    def __init__(self, actor: ActorHandle, running: ray.ObjectRef):
        self._actor, self._over = actor, running.future()

    def ended(self) -> str | None:
        """As `Child.ended`."""
        if not self._over.done():
            return None
        error = self._over.exception() or self._over.result().error
        return "ended" if error is None else f"was lost: {said_of(error)}"

    def kill(self) -> None:
        """As `Child.kill`."""
        end_actors([self._actor])

    def wait(self) -> None:
        """As `Child.wait`."""
        concurrent.futures.wait([self._over], GONE_S)


def _be_rank(request_json: str, front: dict[str, Any]) -> None:
    from xdit_compile.serving.rank_process import be_rank

    be_rank(ServeRequest.from_json(request_json), World.from_environment(), front)
