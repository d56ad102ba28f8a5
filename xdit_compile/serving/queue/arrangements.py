"""How a server's ranks are arranged: all on one request, or gangs of them that work on different ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import METHODS
from xdit_compile.plan.nearest import did_you_mean

LATENCY, THROUGHPUT = "latency", "throughput"
REPLICAS = "replicas"
SPLITS_WEIGHTS = ("tensor", "pipefusion")
"""Methods whose ranks hold parts of the weights, which no other plan could go on with."""
_DEGREES = tuple(method.name for method in METHODS)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """What a server's ranks are divided into.

    Args:
        plan: of every gang.
        gangs: how many there are, which work on different requests.
        name: `LATENCY` or `THROUGHPUT`; empty where there is one arrangement only.
    """

    plan: Plan
    gangs: int = 1
    name: str = ""

    @property
    def ranks(self) -> int:
        """Of all gangs."""
        return self.gangs * self.plan.world_size

    @property
    def words(self) -> str:
        """In one line."""
        degrees = {REPLICAS: self.gangs} | {name: getattr(self.plan, name) for name in _DEGREES}
        shown = ", ".join(f"{name}={degree}" for name, degree in degrees.items() if degree > 1)
        return f"{self.name}: {shown or 'one device'}" if self.name else shown or "one device"


def arrangements_of(plan: Plan, texts: Sequence[str]) -> tuple[Arrangement, ...]:
    """The arrangement for an idle server, and where there are two, the one for a queue.

    Args:
        plan: what gangs have in common; without ``texts`` all there is.
        texts: such as ``latency=ulysses:2`` and ``throughput=replicas:2``.

    Raises:
        UsageError: a text that says no arrangement, one without the other, arrangements of different numbers of ranks,
            or one whose ranks hold parts of the weights.
    """
    if not texts:
        return (Arrangement(plan),)
    if plan.world_size > 1:
        raise UsageError("--plan takes the place of other degrees: put them into it, as in --plan latency=ulysses:2")
    by_name: dict[str, Arrangement] = {}
    for text in texts:
        arrangement = _parsed(plan, text)
        if arrangement.name in by_name:
            raise UsageError(f"--plan {arrangement.name} is given twice")
        by_name[arrangement.name] = arrangement
    missing = [name for name in (LATENCY, THROUGHPUT) if name not in by_name]
    if missing:
        raise UsageError(f"--plan {missing[0]}=... is missing: with one plan alone give its degrees by their own flags")
    idle, busy = by_name[LATENCY], by_name[THROUGHPUT]
    if idle.gangs > 1:
        raise UsageError(f"--plan {LATENCY} has one request use all ranks: {REPLICAS} are for --plan {THROUGHPUT}")
    if idle.ranks != busy.ranks:
        raise UsageError(
            f"--plan {LATENCY} has {idle.ranks} ranks and --plan {THROUGHPUT} {busy.ranks}: let both have one number"
        )
    return idle, busy


def _parsed(plan: Plan, text: str) -> Arrangement:
    name, equals, rest = text.partition("=")
    if not equals or name not in (LATENCY, THROUGHPUT):
        raise UsageError(f"--plan {text}: give {LATENCY}=METHOD:N,... and {THROUGHPUT}={REPLICAS}:N,...")
    degrees: dict[str, Any] = {}
    for word in rest.split(","):
        matched = re.fullmatch(r"\s*(\w+):(\d+)\s*", word)
        if matched is None or int(matched[2]) < 1:
            raise UsageError(f"--plan {text}: {word!r} is no degree; write METHOD:N, as ulysses:2")
        method = matched[1]
        if method not in (*_DEGREES, REPLICAS):
            raise UsageError(f"--plan {text}: there is no method {method}{did_you_mean(method, (*_DEGREES, REPLICAS))}")
        if method in degrees:
            raise UsageError(f"--plan {text}: {method} is given twice")
        degrees[method] = int(matched[2])
    parted = [method for method in SPLITS_WEIGHTS if degrees.get(method, 1) > 1]
    if parted:
        raise UsageError(
            f"--plan {text}: under {parted[0]} a rank holds a part of the weights, which no other plan can go on with; "
            f"leave out --plan and serve with {parted[0]} alone"
        )
    gangs = degrees.pop(REPLICAS, 1)
    return Arrangement(dataclasses.replace(plan, **degrees), gangs, name)
