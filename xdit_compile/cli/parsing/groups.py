"""Commands whose flags stand in groups, and may come from a file or the environment.

A flag is put into a group where it is defined: ``option("--name", group=OUTPUT, help=...)``, which is ``click.option``
otherwise. A plain ``click.option`` stands under `GENERAL`. Every flag of a command that is made with ``cls=Command``
can be given as ``XDIT_COMPILE_NAME`` in the environment and as ``name`` in the file of ``--config``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click
from click.core import ParameterSource

from xdit_compile.errors import UsageError
from xdit_compile.plan.nearest import did_you_mean

from .choices import Choices
from .config import PREFIX, key_of, read_config, shown, variable_of
from .warned import warn
from .words import one_flag_each
from .xdit_flags import REFUSED

MODEL, PICTURE, PARALLEL, COMPILE, SERVICE, RAY, OUTPUT, GENERAL = GROUPS = (
    "Model", "Picture", "Parallel", "Compile", "Service", "Ray", "Output", "General",
)  # fmt: skip
"""In the order in which the help shows them."""
SEEN_ELSEWHERE = ("API_KEY", "CACHE", "CHECK", "DUMP", "LOG")
"""What the compiler itself reads from the environment, after ``XDIT_COMPILE_``."""
RIVALS = (
    ("cache_dir", "no_cache"),
    ("enable_model_cpu_offload", "enable_sequential_cpu_offload"),
)
"""Flags that exclude each other, and have no default: the one nearer to the command line counts."""

_BOOLEAN = re.compile(r"(.+) is not a valid boolean\b.*")
"""How click refuses the value of a flag that is there or not."""
_EPILOG = (
    "A flag may be written with - or _. Each can also be given in the environment, as XDIT_COMPILE_NAME, or in a file, "
    "with --config; what stands in the command line wins, then the environment, then the file."
)


class Flag(click.Option):
    """An option of a group; one with `Choices` lists them at the end of its help."""

    def __init__(self, *arguments: Any, group: str = GENERAL, **settings: Any):
        kind = settings.get("type")
        if isinstance(kind, Choices):
            settings.setdefault("metavar", "NAME")
            settings["help"] = f"{settings.get('help', '')} One of {', '.join(kind.choices)}.".strip()
        super().__init__(*arguments, **settings)
        self.group = group


def option(*names: str, group: str, **settings: Any) -> Callable[..., Any]:
    """``click.option`` with a group, one of `GROUPS`, under which the help shows the flag."""
    return click.option(*names, cls=Flag, group=group, **settings)


def flagged(command: Callable[..., Any], *flags: Callable[..., Any]) -> Callable[..., Any]:
    """A command with some flags, in their order."""
    for flag in reversed(flags):
        command = flag(command)
    return command


class Command(click.Command):
    """A command with flags in groups, ``--config`` and ``--print_config``.

    Where ``obj`` of its context is a dict, it notes there under ``debug`` whether that was asked for, wherever.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.params += _config_flags()
        self.epilog = self.epilog or _EPILOG
        for flag in options_of(self):
            if flag.envvar is None and flag.name != "print_config":
                flag.envvar = variable_of(flag)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags, group by group."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (row := param.get_help_record(ctx)) is not None:
                rows.setdefault(getattr(param, "group", GENERAL), []).append(row)
        for group in GROUPS:
            if group in rows:
                with formatter.section(group):
                    formatter.write_dl(rows[group])

    def make_parser(self, ctx: click.Context) -> Any:
        """The parser, which also knows ``--no_NAME`` for flags without a value: a file may have turned them on."""
        parser = super().make_parser(ctx)
        known = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        for flag in options_of(self):
            negative = f"--no_{key_of(flag)}"
            if flag.is_bool_flag and not flag.secondary_opts and not flag.is_eager and negative not in known:
                parser.add_option(flag, [negative], dest=flag.name, action="store_const", const=False)
        return parser

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse flags; say of an unknown one what it is in xDiT, or which is nearest, and of a wrong value its source.

        Raises:
            UsageError, click.ClickException: with a line that says what to change.
        """
        _warn_of_variables(ctx)
        try:
            rest = super().parse_args(ctx, one_flag_each(self, args, ctx))
        except click.NoSuchOption as error:
            raise _unknown(error, self, ctx) from None
        except click.BadParameter as error:
            raise _sourced(error, ctx) from None
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise
        _drop_rivals(self, ctx)
        if ctx.params.pop("print_config") and not ctx.resilient_parsing:
            click.echo(shown(self, ctx, [(group, _in_group(self, group)) for group in GROUPS]))
            ctx.exit()
        ctx.params.pop("config")
        if isinstance(ctx.obj, dict):
            ctx.obj["debug"] = bool(ctx.params.get("debug"))
        return rest


class Group(click.Group):
    """A group of such commands; a flag that stands before its command is told where it belongs."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what stands before the command.

        Raises:
            click.NoSuchOption: with the commands that have the flag.
        """
        if not args and ctx.parent is not None and not ctx.resilient_parsing:
            raise click.UsageError(f"say which: {ctx.info_name} {_or(self._shown(ctx))}", ctx)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            owners = _owners(self, error.option_name)
            words = f"; it is a flag of {', '.join(owners)}: write the command first" if owners else ""
            raise click.NoSuchOption(
                error.option_name, f"No such option '{error.option_name}'{words}", ctx=ctx
            ) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named.

        Raises:
            click.UsageError: there is none of that name; with the nearest, or all.
        """
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            if error.possibilities:
                raise
            raise click.UsageError(f"No such command {args[0]!r}; take {_or(self._shown(ctx))}", ctx) from None

    def _shown(self, ctx: click.Context) -> list[str]:
        """The commands that are for people."""
        return [name for name in self.list_commands(ctx) if not self.commands[name].hidden]


def _or(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def options_of(command: click.Command) -> list[click.Option]:
    """The flags of a command."""
    return [param for param in command.params if isinstance(param, click.Option)]


def _in_group(command: click.Command, group: str) -> list[click.Option]:
    return [flag for flag in options_of(command) if getattr(flag, "group", GENERAL) == group]


def _config_flags() -> Iterator[click.Option]:
    yield Flag(
        ["--config"],
        type=click.Path(),
        is_eager=True,
        callback=_take_config,
        help="TOML or YAML file with values for these flags, by their names.",
    )
    yield Flag(["--print_config"], is_flag=True, help="Print what would be used and where it is from, as such a file.")


def _take_config(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not ctx.resilient_parsing:
        ctx.default_map = read_config(value, ctx.command, _siblings(ctx))
    return value


def _siblings(ctx: click.Context) -> list[click.Command]:
    """Every command there is."""
    return list(_commands(ctx.find_root().command))


def _commands(command: click.Command) -> Iterator[click.Command]:
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from _commands(each)
    else:
        yield command


def _owners(group: click.Command, name: str) -> list[str]:
    """The commands that have a flag."""
    return [str(each.name) for each in _commands(group) if any(name in flag.opts for flag in options_of(each))]


def _unknown(error: click.NoSuchOption, command: click.Command, ctx: click.Context) -> Exception:
    """What to say of a flag that a command does not have."""
    name = error.option_name
    if (word := name.lstrip("-")) in REFUSED:
        return UsageError(f"{name} is xDiT's: {REFUSED[word]}")
    names = [key.removeprefix("--") for flag in options_of(command) for key in flag.opts if key.startswith("--")]
    owners = [owner for owner in _owners(ctx.find_root().command, name) if owner != command.name]
    words = f"; it is a flag of {', '.join(owners)}" if owners else did_you_mean(word, names, "--")
    return click.NoSuchOption(name, f"No such option '{name}'{words}", ctx=ctx)


def _sourced(error: click.BadParameter, ctx: click.Context) -> click.BadParameter:
    """The error, which also names the file or the variable that the value is from."""
    if error.param is None or error.param.name is None:
        return error
    source, where = ctx.get_parameter_source(error.param.name), None
    if source is ParameterSource.ENVIRONMENT and isinstance(error.param, click.Option):
        where = variable_of(error.param)
    elif source is ParameterSource.DEFAULT_MAP:
        where = ctx.params.get("config")
    if where is None:
        return error
    said = _BOOLEAN.sub(r"\1 is neither true nor false; write 1 or 0", error.message.rstrip("."))
    return click.BadParameter(f"{said} (from {where})", ctx=error.ctx, param=error.param, param_hint=error.param_hint)


def _drop_rivals(command: click.Command, ctx: click.Context) -> None:
    flags = {str(flag.name): flag for flag in options_of(command)}
    for pair in RIVALS:
        sources = [ctx.get_parameter_source(name) for name in pair if flags.keys() >= set(pair) and ctx.params[name]]
        if len(sources) == 2 and None not in sources and sources[0] != sources[1]:
            farther = max(pair, key=lambda name: (ctx.get_parameter_source(name) or ParameterSource.DEFAULT).value)
            ctx.params[farther] = False if flags[farther].is_flag else None
            ctx.set_parameter_source(farther, ParameterSource.DEFAULT)


def _warn_of_variables(ctx: click.Context) -> None:
    """Say of variables that look like ours that nothing reads them; one of several ranks says so."""
    unread = unread_variables(os.environ, _siblings(ctx))
    if unread and not ctx.resilient_parsing and os.environ.get("RANK", "0") == "0":
        known = [variable_of(flag).removeprefix(PREFIX) for flag in options_of(ctx.command)]
        for name in unread:
            near = did_you_mean(name.removeprefix(PREFIX), [*known, *SEEN_ELSEWHERE], PREFIX)
            warn(f"nothing reads {name}{near}")


def unread_variables(variables: Iterable[str], commands: Iterable[click.Command]) -> list[str]:
    """Those of some variables that begin as ours and stand for no flag of any command."""
    ours = [name for name in variables if name.startswith(PREFIX)]
    if not ours:
        return []
    flags = {variable_of(flag) for command in commands for flag in options_of(command)}
    return [name for name in ours if name not in flags and name.removeprefix(PREFIX) not in SEEN_ELSEWHERE]
