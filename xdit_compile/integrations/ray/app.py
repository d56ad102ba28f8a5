"""From what was asked for to an application of Ray Serve: one front, and gangs that come and go with the queue."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.actor import ActorHandle
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.plan.nearest import did_you_mean
from xdit_compile.serving.request import ServeRequest
from xdit_compile.serving.run import settings_of

from .actors import settings_here
from .front import Front
from .gang import FRONT, GANG, Gang
from .placing import STRATEGY, Share

CONNECTIONS = 10_000
"""Of clients, at most."""
HEAD = "node:__internal_head__"
"""What the head of a cluster alone has: the front is there, which no other machine's loss takes along."""
CHECK_S = 2.0
"""So often Serve asks a replica how it is."""
STOP_S = 20.0
LAST_S = 3600.0
"""A gang that is one too many ends what it is at, which may be a long video."""
QUIET = LoggingConfig(log_level="CRITICAL", enable_access_log=False)
"""Of Serve's own log, which has tracebacks of what gangs and front say in a line."""


@dataclasses.dataclass(frozen=True)
class Replicas:
    """How many gangs there are.

    Args:
        least, most: between which the number follows the queue.
        up_s, down_s: it does so after the queue was long, or short, for so many seconds.
    """

    least: int = 1
    most: int = 1
    up_s: float = 5.0
    down_s: float = 120.0

    @classmethod
    def parsed(cls, text: str) -> Replicas:
        """From text such as ``2`` or ``1:4``.

        Raises:
            UsageError: it is no such text.
        """
        matched = re.fullmatch(r"(\d{1,4})(?::(\d{1,4}))?", text.strip())
        least, most = (int(matched[1]), int(matched[2] or matched[1])) if matched else (0, 0)
        if not 1 <= least <= most:
            raise UsageError(f"--replicas {text}: give a number of gangs, or the least and the most of them, as 1:4")
        return cls(least, most)

    def options(self, at_once: int) -> dict[str, Any]:
        """Of a deployment whose replicas take so many requests each. A fixed number takes no measuring."""
        if self.least == self.most:
            return {"num_replicas": self.least}
        bounds = {"min_replicas": self.least, "initial_replicas": self.least, "max_replicas": self.most}
        delays = {"upscale_delay_s": self.up_s, "downscale_delay_s": self.down_s}
        measured = {"target_ongoing_requests": at_once, "metrics_interval_s": 1.0, "look_back_period_s": 2.0}
        return {"autoscaling_config": {**bounds, **delays, **measured}}


def build(args: Mapping[str, Any]) -> Application:
    """An application builder of Ray Serve, for ``import_path: xdit_compile.integrations.ray:build``.

    Args:
        args: fields of `ServeRequest`, as ``model``, ``max_batch`` and ``retry``, and beside them ``plan``, a
            dictionary of `Plan`'s; ``replicas``, as ``"1:4"``; ``rank_resources``, as ``"GPU=1,CPU=4"``.

    Raises:
        UsageError: a field that there is not, or a plan or request that cannot be.
    """
    fields = dict(args)
    plan = Plan(**_known(dict(fields.pop("plan", {})), Plan, "plan"))
    replicas = Replicas.parsed(str(fields.pop("replicas", 1)))
    resources = fields.pop("rank_resources", None)
    request = ServeRequest(plan=plan, **_known(fields, ServeRequest, "args"))
    request.check(None)
    share = Share.usual(request.device == "cpu") if resources is None else Share.parsed(resources)
    return application(request, replicas, share)


def application(request: ServeRequest, replicas: Replicas, share: Share, job: ActorHandle | None = None) -> Application:
    """One front, and gangs.

    Args:
        share: what a rank takes of its machine.
        job: an actor with which the service ends; None for one that stays until it is deleted.
    """
    at_once = request.max_batch if request.plan.alternates else 1
    gang: Any = serve.deployment(
        Gang,
        name=GANG,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[dict(share.amounts)] * request.plan.world_size,
        placement_group_strategy=STRATEGY,
        max_ongoing_requests=at_once,
        **replicas.options(at_once),
        health_check_period_s=CHECK_S,
        health_check_timeout_s=STOP_S,
        graceful_shutdown_timeout_s=LAST_S,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,
        logging_config=QUIET,
    )
    front: Any = serve.deployment(
        serve.ingress()(Front),
        name=FRONT,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
        max_ongoing_requests=CONNECTIONS,
        logging_config=QUIET,
        health_check_period_s=CHECK_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5.0,
    )
    text = request.to_json()
    return front.bind(gang.bind(text, share, settings_here()), text, settings_of(request), job)


def _known(fields: dict[str, Any], kind: Any, where: str) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in names:
            raise UsageError(f"{where} has no {name}{did_you_mean(name, names)}")
    return fields
