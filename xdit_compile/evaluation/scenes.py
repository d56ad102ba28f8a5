"""Scenes of coloured shapes: what the demo model draws, how it is said, and which captions training never sees."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import re
from collections.abc import Iterator, Sequence

COLOURS = {
    "red": (215, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (250, 215, 45),
    "green": (35, 155, 65),
    "blue": (40, 85, 215),
    "purple": (130, 50, 165),
    "pink": (245, 110, 180),
    "brown": (120, 70, 35),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (160, 160, 160),
    "black": (20, 20, 20),
    "sand": (225, 205, 165),
    "mint": (190, 235, 205),
    "lavender": (215, 205, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
SIZES = {"small": 0.10, "medium": 0.15, "large": 0.21}
PLACES = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "center": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
_PLACE_PHRASES = {
    "top left": "in the top left corner",
    "top": "at the top",
    "top right": "in the top right corner",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "in the bottom left corner",
    "bottom": "at the bottom",
    "bottom right": "in the bottom right corner",
}
_HELD_OUT_SHARE = 0.1
_DROPPED_SHARE = 0.1
_PLACE_JITTER = 0.03
_SIZE_JITTER = 0.06


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: a shape with a colour, a size, and the place of its middle as shares of the sides (x, y)."""

    colour: str
    shape: str
    size: str
    middle: tuple[float, float]
    radius: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an image shows: one or two things on a background, plain or striped."""

    things: tuple[Thing, ...]
    background: str
    striped: bool
    tint: tuple[int, ...] = (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Mention:
    """What a caption says of one thing; ``None`` where it says nothing."""

    colour: str
    shape: str
    size: str | None = None
    place: str | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What a caption asks for; a relation holds from the first thing to the second."""

    mentions: tuple[Mention, ...]
    relation: str | None = None
    background: str | None = None
    striped: bool | None = None

    def caption(self, order: int = 0) -> str:
        """The request in words; ``order`` picks one of the ways to arrange them."""
        things = [_noun(mention) for mention in self.mentions]
        subject = things[0] if self.relation is None else f"{things[0]} {self.relation} {things[1]}"
        place = _PLACE_PHRASES[self.mentions[0].place] if self.mentions[0].place else ""
        ground = f"on {_article(self._ground())} background" if self.background else ""
        ways = (
            (subject, place, ground),
            (subject, ground, place),
            (ground, subject, place),
            (place, subject, ground),
        )
        return " ".join(part for part in ways[order % len(ways)] if part)

    def _ground(self) -> str:
        return f"striped {self.background}" if self.striped else str(self.background)


def held_out(request: Request) -> bool:
    """Whether training must never see this combination: colour, shape and place, or both things and their relation."""
    first = request.mentions[0]
    key: tuple[str | None, ...] = (first.colour, first.shape, first.place)
    if request.relation is not None:
        second = request.mentions[1]
        key = (first.colour, first.shape, request.relation, second.colour, second.shape)
    elif first.place is None:
        return False
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT_SHARE * 2**32


def draw_scene(rng: random.Random, things: int) -> tuple[Scene, Request]:
    """A random scene of one or two things, and everything that can be said of it."""
    background, striped = rng.choice(list(BACKGROUNDS)), rng.random() < 0.25
    made: tuple[Thing, ...]
    if things == 1:
        place = rng.choice(list(PLACES))
        made = (_thing(rng, rng.choice(list(COLOURS)), PLACES[place], list(SIZES)),)
        request = Request((_mention(made[0], place),), None, background, striped)
    else:
        relation = rng.choice(list(RELATIONS))
        colours = rng.sample(list(COLOURS), 2)
        made = tuple(
            _thing(rng, colour, middle, ["small", "medium"])
            for colour, middle in zip(colours, _related(rng, relation), strict=True)
        )
        request = Request(tuple(_mention(thing, None) for thing in made), relation, background, striped)
    return Scene(made, background, striped, tuple(rng.randint(-6, 6) for _ in range(3))), request


def training_scenes(seed: int, two_share: float = 0.35) -> Iterator[tuple[Scene, Request]]:
    """Endless scenes and all that can be said of each; nothing held out is among them."""
    rng = random.Random(seed)
    while True:
        scene, request = draw_scene(rng, 2 if rng.random() < two_share else 1)
        if not held_out(request):
            yield scene, request


def phrase(rng: random.Random, request: Request) -> str:
    """One of the captions of a scene; now and then it leaves something out."""

    def kept() -> bool:
        return rng.random() >= _DROPPED_SHARE

    mentions = tuple(
        dataclasses.replace(mention, size=mention.size if kept() else None, place=mention.place if kept() else None)
        for mention in request.mentions
    )
    ground = {} if kept() else {"background": None, "striped": None}
    return dataclasses.replace(request, mentions=mentions, **ground).caption(rng.randrange(4))


def held_out_requests(seed: int, count: int, things: int) -> list[tuple[Request, str]]:
    """Distinct held-out captions, each saying all there is to say, with what they ask for."""
    rng = random.Random(seed)
    requests: dict[str, Request] = {}
    while len(requests) < count:
        _, request = draw_scene(rng, things)
        if held_out(request):
            requests.setdefault(request.caption(rng.randrange(4)), request)
    return [(request, caption) for caption, request in requests.items()]


def parse(caption: str) -> Request | None:
    """What a caption asks for, or ``None`` where it is not of this grammar."""
    text = re.sub(r"[^a-z ]", " ", caption.lower())
    text = " ".join(text.split())
    ground = re.search(rf"on an? (striped )?({'|'.join(BACKGROUNDS)}) background", text)
    text = text.replace(ground.group(), " ") if ground else text
    nouns = list(re.finditer(rf"\ban? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", text))
    if not 1 <= len(nouns) <= 2:
        return None
    rest = " ".join(re.sub(rf"\ban? (?:\w+ )?\w+ (?:{'|'.join(SHAPES)})\b", " ", text).split())
    place = next((name for name, phrase in _PLACE_PHRASES.items() if phrase == rest), None)
    relation = rest if rest in RELATIONS else None
    if rest and (place if len(nouns) == 1 else relation) is None or (len(nouns) == 2) != (relation is not None):
        return None
    mentions = tuple(Mention(noun[2], noun[3], noun[1], place) for noun in nouns)
    return Request(mentions, relation, ground[2] if ground else None, bool(ground[1]) if ground else None)


def vocabulary() -> list[str]:
    """Every word that a caption may hold, in a fixed order."""
    phrases: Sequence[str] = (
        *COLOURS,
        *BACKGROUNDS,
        *SHAPES,
        *SIZES,
        *_PLACE_PHRASES.values(),
        *RELATIONS,
        "a an on striped background",
    )
    return list(dict.fromkeys(itertools.chain.from_iterable(phrase.split() for phrase in phrases)))


def _thing(rng: random.Random, colour: str, near: tuple[float, float], sizes: list[str]) -> Thing:
    size = rng.choice(sizes)
    radius = SIZES[size] * (1 + rng.uniform(-_SIZE_JITTER, _SIZE_JITTER))
    middle = [min(max(at + rng.uniform(-_PLACE_JITTER, _PLACE_JITTER), radius), 1 - radius) for at in near]
    return Thing(colour, rng.choice(SHAPES), size, (middle[0], middle[1]), radius)


def _related(rng: random.Random, relation: str) -> tuple[tuple[float, float], tuple[float, float]]:
    across = rng.uniform(0.3, 0.7)
    near, far = 0.27, 0.73
    x, y = RELATIONS[relation]
    if x:
        left, right = (near, across), (far, across)
        return (left, right) if x < 0 else (right, left)
    top, bottom = (across, near), (across, far)
    return (top, bottom) if y < 0 else (bottom, top)


def _mention(thing: Thing, place: str | None) -> Mention:
    return Mention(thing.colour, thing.shape, None if thing.size == "medium" else thing.size, place)


def _noun(mention: Mention) -> str:
    words = [mention.size, mention.colour, mention.shape]
    return _article(" ".join(word for word in words if word))


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
