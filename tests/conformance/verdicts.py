"""What became of a cell, on one rank and on all."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

REPLICATED = 0.75
"""The part of one process's work from which a rank counts as repeating it."""


class Verdict(enum.StrEnum):
    """From the best to the worst."""

    EXACT = "exact"
    INAPPLICABLE = "inapplicable"
    REFUSED = "refused"
    REPLICATED = "replicated"
    WRONG = "wrong"
    CRASHED = "crashed"

    @property
    def fault(self) -> bool:
        """Whether it must not be."""
        return self in (Verdict.WRONG, Verdict.CRASHED)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One rank's: differences of its requests, beside what rounding alone makes, seconds, its part of one's work.

    ``subject`` is the class of the pipeline, ``modules`` those of its networks.
    """

    verdict: Verdict
    reason: str = ""
    differences: tuple[float, ...] = ()
    rounding: float = 0.0
    seconds: float = 0.0
    work: float | None = None
    subject: str = ""
    modules: tuple[str, ...] = ()


def joined(answers: Sequence[Answer]) -> Answer:
    """The answer of all ranks: the worst of them; a refusal must be everybody's."""
    worst = max(answers, key=lambda answer: list(Verdict).index(answer.verdict))
    kinds = {answer.verdict for answer in answers}
    verdict = worst.verdict
    reason = _reasons([(at, answer.reason) for at, answer in enumerate(answers) if answer.verdict is verdict])
    if not verdict.fault and Verdict.REFUSED in kinds and len(kinds) > 1:
        verdict = Verdict.CRASHED
        reason = "only one rank refused; " + next(a.reason for a in answers if a.verdict is Verdict.REFUSED)
    works = [answer.work for answer in answers if answer.work is not None]
    if verdict is Verdict.EXACT and max(works, default=0.0) > REPLICATED:
        verdict, reason = Verdict.REPLICATED, f"a rank does {max(works):.2f} of one process's work"
    differences = tuple(max(each) for each in zip(*(a.differences for a in answers), strict=False))
    rounding = max(answer.rounding for answer in answers)
    seconds = max(answer.seconds for answer in answers)
    subject, modules = max((answer.subject, answer.modules) for answer in answers)
    return Answer(verdict, reason, differences, rounding, seconds, max(works, default=None), subject, modules)


def _reasons(said: Sequence[tuple[int, str]]) -> str:
    """What ranks said, once where it is the same."""
    reasons = {reason for _, reason in said}
    if len(said) > 1 and len(reasons) == 1:
        return said[0][1]
    return "; ".join(f"rank {at}: {reason}" for at, reason in said if reason)
