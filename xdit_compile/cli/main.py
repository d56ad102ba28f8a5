"""The command line: flags, one line per error, exit code 2 for usage and 1 for failure. Imports torch only to work."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from xdit_compile import __version__
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError, one_line

from .commands.build import build
from .commands.cache import cache
from .commands.evaluate import evaluate
from .commands.explain import explain
from .commands.generate import generate
from .commands.start import worker
from .commands.tune import tune
from .options.flags import normalized

NAME = "xdit-compile"
INTERRUPTED = 130
_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
    "show_default": True,
    "token_normalize_func": normalized,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr, or a traceback with --debug.

    The line of a worker's failure stands alone: a progress bar may have been left open where it would go.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        cli.main(args=arguments or ["--help"], prog_name=NAME, standalone_mode=False)
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except click.ClickException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", NAME)
        return _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", error.exit_code)
    except Exception as error:
        return _failed(error, arguments)


def entry() -> None:
    """The installed command."""
    sys.exit(main())


def _failed(error: Exception, arguments: list[str]) -> int:
    from .running.launch import WorkerFailed, report_failure

    is_worker = arguments[:1] == ["worker"]
    if _wants_debug(arguments, is_worker) and not isinstance(error, WorkerFailed):
        import traceback

        traceback.print_exc()
    if isinstance(error, XditCompileError):
        message, exit_code = one_line(error, limit=4000), error.exit_code
    else:
        message, exit_code = f"{type(error).__name__}: {one_line(error)} (--debug shows where)", 1
    if is_worker:
        report_failure(error, exit_code, message)
        return exit_code
    if isinstance(error, WorkerFailed):
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


@click.group(context_settings=_SETTINGS)
@click.version_option(__version__)
def cli() -> None:
    """Parallel inference for unmodified diffusers pipelines. Flags may be written with - or _."""


for _each in (generate, evaluate, explain, build, tune, cache, worker):
    cli.add_command(_each)
