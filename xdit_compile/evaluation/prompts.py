"""The captions of an evaluation, each with its seed and, where it is of the grammar, with what it asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .scenes import Request, held_out_requests, parse

_TWO_EVERY = 4


@dataclasses.dataclass(frozen=True)
class Question:
    """A caption, the seed of its picture, and what it asks for, where ``parse`` understands it."""

    caption: str
    seed: int
    request: Request | None


def questions(captions: Sequence[str], seed: int) -> list[Question]:
    """Captions with seeds that count up from ``seed``."""
    return [Question(caption, seed + index, parse(caption)) for index, caption in enumerate(captions)]


def held_out_captions(seed: int, count: int) -> list[str]:
    """Captions whose combinations training never sees; every fourth asks for two things."""
    two = count // _TWO_EVERY
    ones = iter(held_out_requests(seed, count - two, 1))
    twos = iter(held_out_requests(seed, two, 2))
    return [next(twos if index % _TWO_EVERY == _TWO_EVERY - 1 else ones)[1] for index in range(count)]
