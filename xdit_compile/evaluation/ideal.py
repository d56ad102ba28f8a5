"""A scene that shows what a caption asks for, to hold pictures of that caption against."""

from __future__ import annotations

import random

from .scenes import BACKGROUNDS, PLACES, RELATIONS, SIZES, Mention, Request, Scene, Thing

_FROM_MIDDLE = 0.23
_JITTER = 0.03
_TINT = 6


def scene_of(request: Request, seed: int) -> Scene:
    """A scene of which everything that the request says is true; the seed decides what it leaves open."""
    rng = random.Random(seed)
    middles = _middles(request, rng)
    things = tuple(_thing(rng, mention, middle) for mention, middle in zip(request.mentions, middles, strict=True))
    background = request.background or rng.choice(list(BACKGROUNDS))
    tint = tuple(rng.randint(-_TINT, _TINT) for _ in range(3))
    return Scene(things, background, bool(request.striped), tint)


def _middles(request: Request, rng: random.Random) -> list[tuple[float, float]]:
    if request.relation is None:
        return [PLACES[request.mentions[0].place or rng.choice(list(PLACES))]]
    across, down = (_FROM_MIDDLE * step for step in RELATIONS[request.relation])
    return [(0.5 + across, 0.5 + down), (0.5 - across, 0.5 - down)]


def _thing(rng: random.Random, mention: Mention, near: tuple[float, float]) -> Thing:
    size = mention.size or "medium"
    x, y = (at + rng.uniform(-_JITTER, _JITTER) for at in near)
    return Thing(mention.colour, mention.shape, size, (x, y), SIZES[size])
