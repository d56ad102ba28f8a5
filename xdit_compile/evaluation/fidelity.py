"""Everything that an evaluation says of the pictures of a plan and of those of one process."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from .checker import Verdict, judge
from .distances import Distance, distances
from .drawing import draw
from .features import load_features
from .frechet import Extract, frechet_difference, frechet_distance
from .ideal import scene_of
from .intervals import Estimate, mean, paired_share_difference, share
from .prompts import Question

JUDGED = ("right", *(field.name for field in dataclasses.fields(Verdict)))
_WIDEST_RESAMPLED = 128


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two pictures of one caption: their distance, and what each shows of what was asked for."""

    question: Question
    distance: Distance
    reference: Verdict | None
    plan: Verdict | None

    def to_json(self) -> dict[str, Any]:
        """Plain values; a verdict is ``None`` for a caption outside the grammar."""
        verdicts = {"reference": self.reference, "plan": self.plan}
        return {
            "caption": self.question.caption,
            "seed": self.question.seed,
            "identical": self.distance.identical,
            **dataclasses.asdict(self.distance),
            **{name: {what: getattr(one, what) for what in JUDGED} if one else None for name, one in verdicts.items()},
        }


@dataclasses.dataclass(frozen=True)
class Distances:
    """Distances over all pairs. ``psnr`` and ``psnr_median`` are over the pairs that differ, ``None`` without any."""

    pairs: int
    identical: int
    psnr: Estimate | None
    psnr_median: float | None
    ssim: Estimate | None
    perceptual: Estimate
    largest: Estimate
    largest_of_all: int


@dataclasses.dataclass(frozen=True)
class Following:
    """The share of pictures that show one thing asked for, by the reference and by the plan, and the difference."""

    reference: Estimate
    plan: Estimate
    difference: Estimate


@dataclasses.dataclass(frozen=True)
class Frechet:
    """Frechet distances between plan, reference, and scenes drawn from the captions that are of the grammar."""

    features: str
    plan_to_reference: float | None
    reference_to_drawn: float | None
    plan_to_drawn: float | None
    difference: Estimate | None
    drawn: int


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """The whole finding. ``following`` maps how many things a caption names to what is judged; empty without any."""

    distances: Distances
    following: dict[str, dict[str, Following]]
    following_pairs: dict[str, int]
    frechet: Frechet
    pairs: tuple[Pair, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "pairs"}
        return {
            **{name: _plain(value) for name, value in found.items()},
            "pairs": [pair.to_json() for pair in self.pairs],
        }


def fidelity(
    questions: Sequence[Question], plan: np.ndarray, reference: np.ndarray, features: str, extract: Extract
) -> Fidelity:
    """Compare the pictures of a plan with the reference's.

    Args:
        plan, reference: ``(n, height, width, 3)``, uint8, one picture for each question.
        features: the name of what ``extract`` computes.
    """
    far = distances(plan, reference, load_features())
    pairs = tuple(
        Pair(question, distance, _verdict(question, before), _verdict(question, after))
        for question, distance, before, after in zip(questions, far, reference, plan, strict=True)
    )
    groups = _groups(pairs)
    return Fidelity(
        _distances(far),
        {name: {what: _following(group, what) for what in JUDGED} for name, group in groups.items()},
        {name: len(group) for name, group in groups.items()},
        _frechet(questions, plan, reference, features, extract),
        pairs,
    )


def _verdict(question: Question, image: np.ndarray) -> Verdict | None:
    return judge(question.request, image) if question.request else None


def _groups(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs whose captions are understood, by the number of things they name."""
    groups: dict[str, list[Pair]] = {}
    for name, count in (("one thing", 1), ("two things", 2)):
        group = [pair for pair in pairs if pair.question.request and len(pair.question.request.mentions) == count]
        if group:
            groups[name] = group
    return groups


def _following(pairs: Sequence[Pair], what: str) -> Following:
    reference = [bool(getattr(pair.reference, what)) for pair in pairs]
    plan = [bool(getattr(pair.plan, what)) for pair in pairs]
    return Following(share(reference), share(plan), paired_share_difference(plan, reference))


def _distances(measurements: Sequence[Distance]) -> Distances:
    levels = [one.psnr for one in measurements if one.psnr is not None]
    alike = [one.ssim for one in measurements if one.ssim is not None]
    largest = [one.largest for one in measurements]
    return Distances(
        len(measurements),
        sum(one.identical for one in measurements),
        mean(levels) if levels else None,
        statistics.median(levels) if levels else None,
        mean(alike) if alike else None,
        mean([one.perceptual for one in measurements]),
        mean(largest),
        max(largest),
    )


def _frechet(
    questions: Sequence[Question], plan: np.ndarray, reference: np.ndarray, features: str, extract: Extract
) -> Frechet:
    after, before = extract(plan), extract(reference)
    scenes = {index: scene_of(one.request, one.seed) for index, one in enumerate(questions) if one.request}
    rows, between = list(scenes), frechet_distance(after, before)
    if len(rows) < 2:
        return Frechet(features, between, None, None, None, len(rows))
    height, width = plan.shape[1:3]
    drawn = extract(np.stack([_fitted(draw(scene, max(height, width)), height, width) for scene in scenes.values()]))
    return Frechet(
        features,
        between,
        frechet_distance(before[rows], drawn),
        frechet_distance(after[rows], drawn),
        frechet_difference(after[rows], before[rows], drawn) if drawn.shape[1] <= _WIDEST_RESAMPLED else None,
        len(rows),
    )


def _fitted(image: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return value
