"""What is said of a name that is not known: which one was meant, and which there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """At most three of some names that ``name`` may have been meant to be, the nearest first.

    They are written nearly alike, or are made of nearly the same words and more.
    """
    names = list(dict.fromkeys(names))
    if typo := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
        return typo
    alike = difflib.get_close_matches(name, names, n=3, cutoff=0.7)
    words = [word for word in name.lower().split("_") if len(word) > 2]
    holding = [
        other for other in names if words and all(_like_one_of(word, other.lower().split("_")) for word in words)
    ]
    return list(dict.fromkeys([*alike, *holding]))[:3]


def _like_one_of(word: str, words: list[str]) -> bool:
    return word in words or bool(difflib.get_close_matches(word, words, n=1, cutoff=0.8))


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """A clause that asks for the nearest names; empty where none is near."""
    near = [f"{prefix}{other}" for other in nearest(name, names)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def unknown(said: str, name: object, names: Iterable[str]) -> str:
    """What to say of a name that is none of ``names``: the nearest of them, and all.

    Args:
        said: how the name is spoken of, such as ``--dtype int3``.
        name: the name itself.
    """
    names = list(names)
    if near := did_you_mean(str(name), names):
        return f"{said} is unknown{near} There are {', '.join(names)}"
    return f"{said} is unknown; choose one of {', '.join(names)}"
