"""What flags take besides text and numbers: one of a few names, and texts with blanks in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import click


class Choices(click.Choice[str]):
    """One of a few names, in any case, which the shell completes and the help lists.

    Args:
        names: those that are listed.
        aliases: other spellings, by what they stand for.
        strict: refuse any other name. Without it one is left to what checks the whole request, which names it together
            with everything else that is wrong there.
    """

    def __init__(self, names: Iterable[str], aliases: Mapping[str, str] | None = None, strict: bool = False):
        super().__init__(tuple(names), case_sensitive=False)
        self.aliases = dict(aliases or {})
        self.strict = strict

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is listed."""
        known = {name.casefold(): name for name in self.choices} | self.aliases
        text = str(value)
        if text.casefold() in known or not self.strict:
            return known.get(text.casefold(), text)
        self.fail(f"{text!r} is unknown; choose one of {', '.join(self.choices)}", param, ctx)


class Lines(click.types.StringParamType):
    """Text that may hold blanks: where a variable of the environment gives several, they are one a line."""

    envvar_list_splitter = "\n"


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
