"""What of a cluster a gang of ranks takes, and whether the cluster has it."""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from xdit_compile.errors import UsageError

log = logging.getLogger(__name__)
STRATEGY = "PACK"
"""The ranks of a gang go onto as few machines as can be."""
BUSY_S = 30.0
"""So long room is waited for that the cluster has, but others use."""
SAID_S = 5.0
"""Waiting is spoken of after so many seconds."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank takes of the machine that it is on.

    Args:
        amounts: by Ray's names of resources, as ``{"CPU": 1, "GPU": 1}``; none is 0.
    """

    amounts: Mapping[str, float]

    @classmethod
    def usual(cls, on_cpu: bool) -> Share:
        """A processor, and a GPU where the cluster has one and ranks may use it."""
        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        return cls({"CPU": 1.0, "GPU": 1.0} if has_gpus and not on_cpu else {"CPU": 1.0})

    @classmethod
    def of(cls, amounts: Mapping[str, float]) -> Share:
        """From amounts by name.

        Raises:
            UsageError: there is none, or one is no positive number.
        """
        wrong = next((name for name, amount in amounts.items() if not 0 < amount < 1e6), None)
        if wrong is not None or not amounts:
            what = f"{amounts[wrong]} of {wrong}" if wrong is not None else "nothing"
            raise UsageError(f"a rank cannot take {what}; write resources={{'GPU': 1, 'CPU': 4}}")
        return cls(dict(amounts))

    @classmethod
    def parsed(cls, text: str) -> Share:
        """From text such as ``CPU=4,GPU=1``.

        Raises:
            UsageError: it is no such text.
        """
        amounts: dict[str, float] = {}
        for word in text.split(","):
            name, equals, number = (each.strip() for each in word.partition("="))
            try:
                amounts[name] = float(number)
            except ValueError:
                amounts[name] = 0.0
            if not name or not equals or not 0 < amounts[name] < 1e6:
                raise UsageError(f"--rank_resources {text}: {word!r} is no amount; write NAME=NUMBER, as GPU=1,CPU=4")
        return cls(amounts)

    @property
    def options(self) -> dict[str, Any]:
        """Of an actor that takes it."""
        others = {name: amount for name, amount in self.amounts.items() if name not in ("CPU", "GPU")}
        return {"num_cpus": self.amounts.get("CPU", 0), "num_gpus": self.amounts.get("GPU", 0), "resources": others}

    def __str__(self) -> str:
        return " and ".join(f"{amount:g} {name}" for name, amount in self.amounts.items())

    def times(self, resources: Mapping[str, float]) -> int:
        """How many fit into a machine of these resources."""
        return int(min(resources.get(name, 0) / amount + 1e-6 for name, amount in self.amounts.items()))


def most_gangs(share: Share, ranks: int) -> int:
    """How many gangs of so many ranks the cluster holds when nothing else runs there."""
    return sum(share.times(node["Resources"]) for node in ray.nodes() if node["Alive"]) // ranks


def reserved(
    share: Share, ranks: int, gangs: int, wait_s: float, look: Callable[[], None] = lambda: None
) -> list[PlacementGroup]:
    """Room for gangs, which is held until it is given back.

    Args:
        wait_s: for machines that join; 0 refuses at once what the cluster does not have.
        look: called about once a second while this waits; what it raises ends that.

    Raises:
        UsageError: there is not so much, or it did not become free in time.
    """
    held = most_gangs(share, ranks)
    wanted = f"{ranks} rank{'s' if ranks > 1 else ''} of {share}"
    wanted = f"{gangs} gangs of {wanted} each" if gangs > 1 else wanted
    if held < gangs and wait_s <= 0:
        raise UsageError(
            f"the cluster has no room for {wanted}: it has {_all()}, on {_machines()}; take fewer, take less of "
            "a machine for each rank, or wait for more machines"
        )
    groups = [placement_group([dict(share.amounts)] * ranks, strategy=STRATEGY) for _ in range(gangs)]
    try:
        _wait(groups, max(BUSY_S, wait_s) if held >= gangs else wait_s, wanted, look)
    except BaseException:
        give_back(groups)
        raise
    return groups


def give_back(groups: Sequence[PlacementGroup]) -> None:
    """Let others have the room, once it is free."""
    for group in groups:
        remove_placement_group(group)
    limit = time.monotonic() + SAID_S
    while time.monotonic() < limit and any(_state(group) not in ("REMOVED", "") for group in groups):
        time.sleep(0.02)


def _wait(groups: Sequence[PlacementGroup], limit_s: float, wanted: str, look: Callable[[], None]) -> None:
    begin, is_said = time.monotonic(), False
    for group in groups:
        while not group.wait(1):
            look()
            waited = time.monotonic() - begin
            if waited > limit_s:
                free = ", ".join(f"{amount:g} {name}" for name, amount in _shown(ray.available_resources()).items())
                raise UsageError(
                    f"the cluster had no room for {wanted} within {limit_s:.0f} s: {free or 'nothing'} of {_all()} is "
                    "free; end what uses the rest, or take less"
                )
            if waited > SAID_S and not is_said:
                is_said = True
                log.warning("waiting up to %.0f s for room in the cluster for %s", limit_s, wanted)


def _state(group: PlacementGroup) -> str:
    table: dict[str, Any] = ray.util.placement_group_table(group)
    return str(table.get("state", ""))


def _all() -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in _shown(ray.cluster_resources()).items()) or "nothing"


def _machines() -> str:
    count = collections.Counter(node["Alive"] for node in ray.nodes())[True]
    return f"{count} machine{'s' if count != 1 else ''}"


def _shown(resources: Mapping[str, float]) -> dict[str, float]:
    """What ranks could ask for: no memory, and no names of machines."""
    hidden = ("node:", "memory", "object_store_memory", "accelerator_type:", "bundle")
    return {
        name: amount
        for name, amount in sorted(resources.items())
        if not name.startswith(hidden) and "_group_" not in name
    }
