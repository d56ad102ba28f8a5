"""Ranks that work on the same requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .members import GangLost, Member, answers
from .messages import Ready, Report, Turn, Usage


class Gang:
    """Ranks of one plan, which take turns together.

    Args:
        members: in the order of their ranks in the plan.
        ready: what they said when they were.
        turn_s: a turn may take so long, compiling included.

    Attributes:
        facts: as `Ready` has them.
        usages: the same, by rank.
    """

    def __init__(self, members: Sequence[Member], ready: Sequence[Ready], turn_s: float):
        self.facts: dict[str, Any] = ready[0].facts
        self.usages: dict[int | str, Usage] = {each.rank: each.usage for each in ready}
        self._members, self._turn_s = members, turn_s

    def look(self) -> None:
        """See that ranks that have nothing to do are there.

        Raises:
            GangLost: one is not.
        """
        for member in self._members:
            member.refuse_gone()

    def exchange(self, turn: Turn) -> list[Report]:
        """Have all ranks take a turn; their reports in the order of ranks.

        Raises:
            GangLost: one died or failed, they differ, or a turn takes too long.
        """
        for member in self._members:
            member.send(turn)
        limit = time.monotonic() + self._turn_s
        reports = answers(self._members, Report, lambda: time.monotonic() < limit, "did not end its turn")
        _compare(reports)
        return reports


def _compare(reports: list[Report]) -> None:
    first = {id: told.compared for id, told in reports[0].told.items()}
    for report in reports[1:]:
        other = {id: told.compared for id, told in report.told.items()}
        if other != first:
            differing = next(id for id in {**first, **other} if first.get(id) != other.get(id))
            words = report.told[differing].error or reports[0].told[differing].error or "it went another way"
            raise GangLost(f"ranks {reports[0].rank} and {report.rank} differ over a request: {words}")
