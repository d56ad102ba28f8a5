"""Looks at what a run needs."""

from __future__ import annotations

import click

from xdit_compile.cli.parsing.groups import COMPILE, GENERAL, OUTPUT, Command, option


@click.command(cls=Command)
@option("--no_run", group=GENERAL, is_flag=True, help="Compile no small graph, and start no two processes.")
@option("--json", "as_json", group=OUTPUT, is_flag=True, help="Print one JSON object in place of the report.")
@option("--cache_dir", group=COMPILE, type=click.Path(), help="Look at this folder in place of the usual cache.")
def doctor(no_run: bool, as_json: bool, cache_dir: str | None) -> None:
    """Look at all that a run needs on this host: versions, cards, links, compiler, cache, memory, processes.

    The exit code is 1 where something is missing that is required.
    """
    from xdit_compile.cli.checks.doctor import doctor as look

    look(cache_dir, not no_run, as_json)
