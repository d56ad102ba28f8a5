"""Ranks compile different structures at the same time, and load what the others compiled."""

from __future__ import annotations

import base64
import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xdit_compile.backends.codes import Codes
from xdit_compile.backends.forms import Forms
from xdit_compile.backends.sites import Job, Run, Sites

from .progress import Progress
from .stored_call import StoredCode

Exchange = Callable[[str, Any], dict[int, Any]]
"""Says something at a stage, and gives what every other rank says there."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The code that one program wants, and what runs it."""

    sites: Sites
    code: StoredCode

    @classmethod
    def of(cls, sites: Sites, inputs: Forms, codes: Codes) -> Wanted:
        """What a program wants for inputs of these forms."""
        named = [(job, codes.name(sites.structure(job.target), job.forms)) for job in sites.jobs(inputs)]
        return cls(sites, StoredCode(inputs, tuple(named)))


@dataclasses.dataclass(frozen=True)
class Company:
    """Who takes code from whom.

    Args:
        rank: this one.
        exchange: among ranks that share what they compile; gives nothing where each compiles for itself.
        sends: whether code goes with what ranks tell one another, as they have no folder in common.
        together: whether ranks have one.
    """

    rank: int = 0
    exchange: Exchange = lambda stage, mine: {}
    sends: bool = False
    together: bool = False


@dataclasses.dataclass(frozen=True)
class Shares:
    """Who compiles what.

    Args:
        wanted: of all programs of this rank.
        places: where code is wanted, by its name.
        runs: what of it is there.
        turns: what each rank compiles of the rest, in order.
    """

    wanted: Sequence[Wanted]
    places: Mapping[str, tuple[Wanted, Job]]
    runs: dict[str, Run]
    turns: Mapping[int, Sequence[str]]

    @classmethod
    def agreed(cls, wanted: Sequence[Wanted], codes: Codes, company: Company) -> Shares:
        """The shares of all ranks, which call this at once, each with programs of its own.

        What several ranks want one of them compiles; costly structures come first, each to the rank that has least to
        do.
        """
        places = {name: (one, job) for one in wanted for job, name in one.code.jobs if name is not None}
        runs = {name: run for name in places if (run := codes.known(name)) is not None}
        costs = {name: _cost(*place) for name, place in places.items() if name not in runs}
        turns = turns_of({company.rank: costs, **company.exchange("what to compile", costs)})
        return cls(wanted, places, runs, turns)


def compile_together(shares: Shares, codes: Codes, company: Company, show: Progress) -> None:
    """Have every program run compiled code; every rank calls this at once.

    After each of its structures a rank waits for the others, so that no wait is longer than one compilation takes.

    Args:
        show: told of every structure.
    """
    places, runs, turns = shares.places, shares.runs, shares.turns
    here, lacking = turns[company.rank], places.keys() - runs.keys()
    show.begin(sum(map(len, turns.values())))
    for turn in range(max(map(len, turns.values()))):
        made: dict[str, str] = {}
        if turn < len(here):
            one, job = places[here[turn]]
            runs[here[turn]], packed = codes.compile(here[turn], one.sites.structure(job.target), job.forms)
            packed = codes.bytes_of(here[turn]) if packed is None and company.sends else packed
            made = {here[turn]: "" if packed is None else _sent(packed)}
        for others in company.exchange("what was compiled", made).values():
            for name in others.keys() & lacking:
                run = _received(codes, name, *places[name], others[name])
                runs.update({} if run is None else {name: run})
        show.step(sum(turn < len(each) for each in turns.values()))
    show.end()
    for one in shares.wanted:
        found = [(job, _run(one.sites, job, name, runs, codes)) for job, name in one.code.jobs]
        one.sites.supply(one.code.inputs, found)


def turns_of(costs: Mapping[int, Mapping[str, float]]) -> dict[int, list[str]]:
    """What each rank compiles, in order; the same on all, as all know what each of them wants.

    Args:
        costs: for each rank what it wants, with what that costs.
    """
    turns: dict[int, list[str]] = {rank: [] for rank in costs}
    load = dict.fromkeys(costs, 0.0)
    cost = {name: value for each in costs.values() for name, value in each.items()}
    for name in sorted(cost, key=lambda name: (-cost[name], name)):
        ranks = [rank for rank in sorted(costs) if name in costs[rank]]
        rank = min(ranks, key=load.__getitem__)
        turns[rank].append(name)
        load[rank] += cost[name]
    return turns


def _cost(one: Wanted, job: Job) -> float:
    return float(len(one.sites.structure(job.target).graph.nodes))


def _run(sites: Sites, job: Job, name: str | None, runs: Mapping[str, Run], codes: Codes) -> Run:
    """What computes a structure; compiled here where no other rank could hand it over."""
    if name is not None and name in runs:
        return runs[name]
    return codes.compile(name, sites.structure(job.target), job.forms)[0]


def _sent(packed: bytes) -> str:
    return base64.b64encode(zlib.compress(packed)).decode()


def _received(codes: Codes, name: str, one: Wanted, job: Job, sent: str) -> Run | None:
    """Code that another rank compiled: what came along, or what is in the store now."""
    if not sent:
        return codes.known(name)
    return codes.take(name, one.sites.structure(job.target), job.forms, zlib.decompress(base64.b64decode(sent)))
