"""How many answers there are of each kind, and what part may be refused or repeated."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping

from conformance.plans import PLANS, STALE
from conformance.runner import Cell
from conformance.verdicts import Answer, Verdict

REFUSED_AT_MOST = 0.05
REPLICATED_AT_MOST = 0.10


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of the cells to which the exact methods apply, and the most that it may be."""

    verdict: Verdict
    count: int
    applicable: int
    most: float

    @property
    def holds(self) -> bool:
        """Whether it is no more than it may be."""
        return self.count <= self.most * self.applicable

    def __str__(self) -> str:
        part = 100 * self.count / max(self.applicable, 1)
        kept = "holds" if self.holds else "does NOT hold"
        most = f"at most {100 * self.most:.0f} %"
        return f"{self.verdict}: {self.count} of {self.applicable}, {part:.1f} %, {most}: {kept}"


def shares(found: Mapping[Cell, Answer]) -> tuple[Share, ...]:
    """Of the exact methods' applicable cells: those that are wrong or crashed, refused, replicated."""
    exact = [answer for cell, answer in found.items() if cell.plan not in STALE]
    applicable = [answer.verdict for answer in exact if answer.verdict is not Verdict.INAPPLICABLE]
    counts, every = collections.Counter(applicable), len(applicable)
    most = {Verdict.WRONG: 0.0, Verdict.CRASHED: 0.0, Verdict.REFUSED: REFUSED_AT_MOST}
    most[Verdict.REPLICATED] = REPLICATED_AT_MOST
    return tuple(Share(verdict, counts[verdict], every, part) for verdict, part in most.items())


def totals(found: Mapping[Cell, Answer]) -> dict[str, collections.Counter[Verdict]]:
    """How many answers of each kind there are, by plan."""
    return {plan: collections.Counter(a.verdict for cell, a in found.items() if cell.plan == plan) for plan in PLANS}
