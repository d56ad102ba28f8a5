"""Flags from a file, TOML or YAML, with the flags' names as keys; and what is in force, written as such a file."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from xdit_compile.errors import UsageError, one_line, reason_of
from xdit_compile.plan.nearest import did_you_mean

from .xdit_flags import REFUSED

PREFIX = "XDIT_COMPILE_"
"""How variables of the environment begin that stand for flags."""
SUFFIXES = (".toml", ".yaml", ".yml")
_OF_A_FILE = ("config", "print_config")


def key_of(flag: click.Parameter) -> str:
    """What a flag is called in a file: its first long name."""
    names = [name for name in flag.opts if name.startswith("--")]
    return (names or flag.opts)[0].lstrip("-").replace("-", "_")


def variable_of(flag: click.Parameter) -> str:
    """What a flag is called in the environment."""
    return f"{PREFIX}{key_of(flag).upper()}"


def read_config(path: str, command: click.Command, commands: Sequence[click.Command]) -> dict[str, Any]:
    """Values for the flags of a command, by the names of its parameters.

    A key is a flag's name. One that another command has, and this one has not, is passed over, so that commands can
    share a file; a table with a command's name holds what is for that one alone.

    Raises:
        UsageError: the file cannot be read, or has a key that no command has, or a value that the flag cannot take.
    """
    content = _content(path)
    tables = {str(each.name): content.pop(str(each.name)) for each in commands if _is_table(content, each)}
    tables_of = {str(each.name) for each in commands}
    known = {str(each.name): _keys([each]) for each in commands} | {"": _keys(commands)}
    for name, table in {"": content, **tables}.items():
        for key in table:
            if not name and str(key) in tables_of:
                raise UsageError(f"--config {path}: {key} is a command; give it a table of its flags")
            if _folded(key) not in known[name]:
                raise UsageError(f"--config {path}: {_refusal(_folded(key), known[name])}")
    flags, values = _keys([command]), {}
    for key, value in (content | tables.get(str(command.name), {})).items():
        flag = flags.get(_folded(key))
        if flag is not None and value is not None:
            values[str(flag.name)] = _value(path, _folded(key), flag, value)
    return values


def _folded(key: Any) -> str:
    """A key as flags are known."""
    return str(key).replace("-", "_")


def _is_table(content: dict[Any, Any], command: click.Command) -> bool:
    return isinstance(content.get(str(command.name)), dict)


def _keys(commands: Iterable[click.Command]) -> dict[str, click.Option]:
    """The flags of some commands by each of their long names."""
    flags = [param for command in commands for param in command.params if isinstance(param, click.Option)]
    return {
        name.lstrip("-").replace("-", "_"): flag
        for flag in flags
        if flag.name not in _OF_A_FILE
        for name in flag.opts
        if name.startswith("--")
    }


def _refusal(name: str, known: Iterable[str]) -> str:
    if name in REFUSED:
        return f"{name} is xDiT's: {REFUSED[name]}"
    return f"no flag is called {name}{did_you_mean(name, known)}"


def _content(path: str) -> dict[Any, Any]:
    """The keys and values of a file.

    Raises:
        UsageError: it is no such file.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--config {path} must end in one of {', '.join(SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"--config {path} does not exist") from None
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {reason_of(error)}") from error
    try:
        content = tomllib.loads(text) if file.suffix.lower() == ".toml" else _yaml(text)
    except ValueError as error:
        raise UsageError(f"--config {path} is broken: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must hold keys and values, such as ulysses_degree: 2")
    return content


def _yaml(text: str) -> Any:
    """What YAML says; an empty text says nothing.

    Raises:
        ValueError: it is none.
    """
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from error


def _value(path: str, name: str, flag: click.Option, value: Any) -> Any:
    """A value as the flag's type takes it: numbers as they would be typed, so that 2.5 is no whole number.

    Raises:
        UsageError: it is of another kind.
    """
    refused = f"--config {path}: {name} = {value!r} "
    if flag.is_flag:
        if not isinstance(value, bool):
            raise UsageError(f"{refused}must be true or false")
        return value
    if flag.multiple:
        return [_scalar(refused, each) for each in (value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        return ",".join(_scalar(refused, each) for each in value)
    return _scalar(refused, value)


def _scalar(refused: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{refused}must be a text or a number")
    return str(value)


def shown(command: click.Command, ctx: click.Context, groups: Iterable[tuple[str, list[click.Option]]]) -> str:
    """What is in force for a command, as TOML, with where each value is from as a comment.

    Args:
        groups: its flags by group.
    """
    lines = [f"# {ctx.command_path}"]
    for group, flags in groups:
        rows = [_row(flag, ctx) for flag in flags if flag.name not in _OF_A_FILE and not flag.hidden]
        if rows:
            width = min(max(len(row[0]) for row in rows), 48)
            lines += ["", f"# {group}", *(f"{text:<{width}}  # {source}" for text, source in rows)]
    return "\n".join(lines)


def _row(flag: click.Option, ctx: click.Context) -> tuple[str, str]:
    """A flag's line, and where its value is from; one that has none is left to the pipeline."""
    value = ctx.params[str(flag.name)]
    source = ctx.get_parameter_source(str(flag.name))
    where = {
        ParameterSource.COMMANDLINE: "command line",
        ParameterSource.ENVIRONMENT: variable_of(flag),
        ParameterSource.DEFAULT_MAP: str(ctx.params.get("config")),
    }
    said = where.get(source, "default") if source is not None else "default"
    if value is None or (flag.multiple and not value):
        return f"# {key_of(flag)} =", f"{said}: not set"
    return f"{key_of(flag)} = {in_toml(value)}", said


def in_toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(in_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
