"""What flags take besides text and numbers: one of a few names, and texts with blanks in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from xdit_compile.plan.nearest import unknown


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
        self.fail(unknown(repr(text), text, self.choices), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        """The names that begin so, as they are listed: in them - and _ are not the same."""
        begun = incomplete.casefold()
        return [CompletionItem(name) for name in self.choices if name.casefold().startswith(begun)]


class NamesByComma(click.types.StringParamType):
    """Text that holds some of a few names, with commas between them, of which the shell completes the last."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self.names = tuple(names)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        """What stands there, with each name that may be the last and does not stand there yet."""
        before, comma, last = incomplete.rpartition(",")
        names = [name for name in self.names if name.startswith(last) and name not in before.split(",")]
        return [CompletionItem(before + comma + name) for name in names]


class Lines(click.types.StringParamType):
    """Text that may hold blanks: where a variable of the environment gives several, they are one a line."""

    envvar_list_splitter = "\n"
