"""The command line: flags, one line per error, exit code 2 for usage and 1 for failure. Imports torch only to work."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError, one_line

from .commands.build import build
from .commands.cache import cache
from .commands.completion import completion
from .commands.doctor import doctor
from .commands.evaluate import evaluate
from .commands.explain import explain
from .commands.generate import generate
from .commands.serve import serve, serve_rank, serve_room
from .commands.start import worker
from .commands.tune import tune
from .options.flags import normalized
from .options.versions import print_version
from .parsing.completing import VARIABLE, completed
from .parsing.groups import Group
from .parsing.plan_words import in_flags
from .processes.ending import Interrupted, Signals
from .processes.speech import as_found

NAME = "xdit-compile"
_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
    "show_default": True,
    "token_normalize_func": normalized,
}


def main(arguments: Sequence[str] | None = None, signals: Signals | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr, or a traceback with --debug.

    The line of a worker's failure stands alone: a progress bar may have been left open where it would go.

    Args:
        signals: what listens to those that end the command, where anything does.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked: dict[str, bool] = {}
    try:
        if asks := os.environ.get(VARIABLE):
            print(completed(cli, asks))
            return 0
        with as_found():
            logging.getLogger("xdit_compile").addFilter(_told_in_flags)
            cli.main(args=arguments or ["--help"], prog_name=NAME, standalone_mode=False, obj=asked)
        if signals is None:
            return 0
        signals.over()
        return 0 if signals.came is None else _interrupted(signals.came, arguments)
    except BaseException as error:
        if signals is not None:
            signals.over()
        arguments += ["--debug"] if asked.get("debug") and "--debug" not in arguments else []
        came = error if isinstance(error, Interrupted) else None if signals is None else signals.came
        return _told(error, arguments) if came is None else _interrupted(came, arguments)


def _told_in_flags(record: logging.LogRecord) -> bool:
    """Have a warning name flags where it names settings of a plan."""
    record.msg, record.args = in_flags(record.getMessage()), ()
    return True


def _told(error: BaseException, arguments: list[str]) -> int:
    """Say what ended a command, and give the exit code for it."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        return _interrupted(Interrupted(signal.SIGINT), arguments)
    if isinstance(error, click.ClickException):
        command = getattr(getattr(error, "ctx", None), "command_path", NAME)
        said = " ".join(error.format_message().split())
        return _fail(f"{said.rstrip('.')} (see {command} --help)", error.exit_code)
    if isinstance(error, Exception):
        return _failed(error, arguments)
    raise error


def entry() -> None:
    """The installed command."""
    signals = Signals()
    signals.listen()
    exit_code = main(signals=signals)
    signals.end(exit_code)
    sys.exit(exit_code)


def _interrupted(came: Interrupted, arguments: list[str]) -> int:
    """Say so, once: the processes of --nproc end without a word, and of those that another launcher started one speaks.

    The line stands alone: a progress bar, or what the terminal shows of the key, may stand where it would go.
    """
    if arguments[:1] == ["worker"] or (_rank_prefix() and not _rank_prefix().startswith("rank 0:")):
        return came.exit_code
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return _fail(str(came), came.exit_code)


def _failed(error: Exception, arguments: list[str]) -> int:
    from .processes.launch import WorkerFailed, report_failure

    is_worker = arguments[:1] == ["worker"]
    if _wants_debug(arguments, is_worker) and not isinstance(error, WorkerFailed):
        import traceback

        traceback.print_exc()
    if isinstance(error, XditCompileError):
        message, exit_code = in_flags(one_line(error, limit=4000)), error.exit_code
    else:
        message, exit_code = f"{type(error).__name__}: {one_line(error)} (--debug shows where)", 1
    if is_worker:
        report_failure(error, exit_code, message)
        return exit_code
    if isinstance(error, WorkerFailed) and sys.stderr.isatty():
        print(file=sys.stderr)
    return _fail(message, exit_code)


def _wants_debug(arguments: list[str], is_worker: bool) -> bool:
    return bool(json.loads(arguments[-1])["debug"]) if is_worker else "--debug" in arguments


def _fail(message: str, exit_code: int) -> int:
    print(f"{NAME}: error: {_rank_prefix()}{message}", file=sys.stderr, flush=True)
    return exit_code


def _rank_prefix() -> str:
    try:
        world = World.from_environment()
    except UsageError:
        return ""
    return f"rank {world.rank}: " if world.launched else ""


@click.group(cls=Group, context_settings=_SETTINGS)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=print_version,
    help="Show the versions of this and of what it runs on, and exit.",
)  # fmt: skip
def cli() -> None:
    """Parallel inference for unmodified diffusers pipelines. Flags may be written with - or _."""


for _each in (
    generate,
    serve,
    evaluate,
    explain,
    build,
    tune,
    cache,
    completion,
    doctor,
    worker,
    serve_rank,
    serve_room,
):
    cli.add_command(_each)
