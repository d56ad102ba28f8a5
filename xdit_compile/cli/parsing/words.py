"""The words of a command line before they are parsed: each value gets a flag of its own, and stray ones are refused."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import click

from .choices import Lines

LISTS = ("attn_layer_num_for_pp", "mesh_order", "without")
"""Flags that take a list with commas."""
FLAGS_AS_VALUES = ("also",)
"""Flags whose value is flags itself."""
_PROMPT = "prompt"
_FLAG = re.compile(r"(--[^\s=]*|-[A-Za-z])(=|$)")


def one_flag_each(command: click.Command, words: Sequence[str], ctx: click.Context) -> list[str]:
    """Words in which several values after one flag, as xDiT takes them, have a flag each, or commas.

    Raises:
        click.UsageError: a flag lacks its value, or has more than it takes, as a text without quotes has.
    """
    if any(isinstance(param, click.Argument) for param in command.params):
        return list(words)
    flags = {name: param for param in command.params if isinstance(param, click.Option) for name in param.opts}
    made: list[str] = []
    flag: click.Option | None = None
    values: list[str] = []
    for word in words:
        if flag is not None and flag.name in FLAGS_AS_VALUES and not values:
            values = [word]
            made.append(word)
            continue
        if _FLAG.match(word):
            _check_values(flag, values, word, ctx)
            flag = flags.get(f"--{word.partition('=')[0].lstrip('-').replace('-', '_')}")
            values = [word.partition("=")[2]] if "=" in word else []
            made.append(word)
            continue
        if not made and not ctx.resilient_parsing:
            prompt = f"; a prompt is given as --{_PROMPT} {shlex.quote(word)}" if f"--{_PROMPT}" in flags else ""
            raise click.UsageError(f"{word!r} belongs to no flag{prompt}", ctx)
        if flag is not None and flag.multiple and values:
            made.append(flag.opts[0])
        if flag is not None and flag.name in LISTS and values:
            made[-1] += f",{word}"
        else:
            made.append(word)
        values.append(word)
    _check_values(flag, values, None, ctx)
    return made


def _check_values(flag: click.Option | None, values: list[str], following: str | None, ctx: click.Context) -> None:
    """See that a flag has as many values as it takes.

    Args:
        following: the flag after it; None at the end, where the parser says what is missing.
    """
    if flag is None or ctx.resilient_parsing:
        return
    name, single = flag.opts[0], not flag.multiple and flag.name not in LISTS
    if flag.is_flag:
        if values:
            raise click.UsageError(f"{name} takes no value, and {values[0]!r} follows it; leave that out", ctx)
    elif not values and following is not None and not isinstance(flag.flag_value, str | int):
        raise click.UsageError(f"{name} needs a value, and {following} follows it", ctx)
    elif len(values) > 1 and (single or _is_torn(flag, values)):
        text = shlex.quote(" ".join(values))
        if isinstance(flag.type, click.types.StringParamType):
            raise click.UsageError(
                f"{name} is followed by {len(values)} words; quote a text of several: {name} {text}"
                + (f", or give {name} again for each" if flag.multiple else ""),
                ctx,
            )
        raise click.UsageError(f"{name} takes one value, and {values[1]!r} follows {values[0]!r}; leave it out", ctx)


def _is_torn(flag: click.Option, values: list[str]) -> bool:
    """Whether several values look like a text without its quotes: prompts of one word each."""
    return isinstance(flag.type, Lines) and flag.name == _PROMPT and not any(" " in value for value in values)
