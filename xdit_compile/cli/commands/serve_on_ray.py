"""The flags with which ``serve`` goes to a cluster of Ray, and what is refused before Ray is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from xdit_compile.cli.parsing.groups import RAY, flagged, option
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.serving.request import ServeRequest


@dataclasses.dataclass(frozen=True)
class ClusterFlags:
    """How a cluster is used; None where a flag is not given.

    Args:
        ray: the cluster's address; empty for the one that is here, or is started.
        replicas, rank_resources, wait_for_nodes: as the flags say.
    """

    ray: str | None
    replicas: str | None
    rank_resources: str | None
    wait_for_nodes: float | None

    def check(self, request: ServeRequest, world: World) -> None:
        """See that the flags go with each other and with the rest.

        Raises:
            UsageError: they do not.
        """
        given = [name for name, value in dataclasses.asdict(self).items() if value is not None]
        if given and self.ray is None:
            raise UsageError(f"--{given[0]} says how a cluster of Ray is used; give --ray, too")
        if self.ray is not None and world.launched:
            raise UsageError("--ray starts the ranks itself; leave out the launcher")
        if self.ray is not None and request.plans:
            raise UsageError("--plan changes plans on one machine; with --ray give the degrees by their own flags")
        if self.wait_for_nodes is not None and not 0 <= self.wait_for_nodes < 1e6:
            raise UsageError(f"--wait_for_nodes {self.wait_for_nodes:g} must be a number of seconds, 0 or more")


def ray_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Those of a cluster."""
    return flagged(
        command,
        option(
            "--ray",
            group=RAY,
            is_flag=False,
            flag_value="",
            metavar="[ADDRESS]",
            help="Serve on a cluster.  [without ADDRESS: RAY_ADDRESS, or this machine's, started if there is none]",
        ),
        option(
            "--replicas", group=RAY, metavar="N|MIN:MAX", help="Gangs of ranks, by the queue's length.  [default: 1]"
        ),
        option(
            "--rank_resources",
            group=RAY,
            metavar="NAME=NUMBER,...",
            help="What a rank takes of its machine.  [default: CPU=1, and GPU=1 where there are any]",
        ),
        option(
            "--wait_for_nodes",
            group=RAY,
            type=float,
            metavar="SECONDS",
            help="Wait for machines that join, where the cluster is too small.",
        ),
    )


def serve_on_ray(request: ServeRequest, world: World, nproc: int | None, flags: ClusterFlags) -> None:
    """Serve there until a signal comes.

    Raises:
        UsageError: Ray is not here, or the request cannot be.
    """
    from xdit_compile.integrations.ray.needed import check_ray

    check_ray()
    request = request.with_method(world, nproc)
    request.check(world, nproc or request.plan.world_size)
    from xdit_compile.integrations.ray.app import Replicas
    from xdit_compile.integrations.ray.service import serve_on_ray as run

    replicas = Replicas() if flags.replicas is None else Replicas.parsed(flags.replicas)
    run(request, flags.ray or "", replicas, flags.rank_resources, flags.wait_for_nodes or 0.0)
