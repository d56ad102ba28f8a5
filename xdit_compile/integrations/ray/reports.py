"""What gangs and the front tell each other beside the requests themselves; plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from xdit_compile.serving.queue.messages import Report, Turn, Usage
from xdit_compile.serving.room import Free

SILENT_S = 10.0
"""A gang or a front that has said nothing for so long is gone."""


@dataclasses.dataclass(frozen=True)
class GangReport:
    """How a gang is.

    Args:
        name: of the replica.
        facts: as `Ready` has them.
        plan: in words.
        ready: whether its ranks are there.
        free: what each had at least before it loaded anything.
        restarts: how often they were started anew.
        usages: by rank.
        turns: that were taken since the last report, with what the first rank said of each.
    """

    name: str
    facts: dict[str, Any]
    plan: str
    ready: bool
    free: Free
    restarts: int
    usages: dict[int | str, Usage]
    turns: tuple[tuple[Turn, Report], ...] = ()


def without_pictures(turn: Turn, report: Report) -> tuple[Turn, Report]:
    """A turn and what was said of it, for counting: without what was made."""
    told = {
        id: dataclasses.replace(each, pictures=None, latents=None, preview=None) for id, each in report.told.items()
    }
    return Turn(run=turn.run), dataclasses.replace(report, told=told)
