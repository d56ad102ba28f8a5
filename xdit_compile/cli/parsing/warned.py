"""Warnings of a command before its log is set up: under the level that the environment names, as that has it."""

from __future__ import annotations

import logging

import click

from xdit_compile.plan.log_level import log_level


def warn(line: str) -> None:
    """Say a line on stderr, unless ``XDIT_COMPILE_LOG`` wants errors alone and no flag says how much.

    Raises:
        UsageError: ``XDIT_COMPILE_LOG`` is no level.
    """
    context = click.get_current_context(silent=True)
    is_flagged = context is not None and any(context.params.get(name) for name in ("quiet", "verbose", "debug"))
    if is_flagged or (log_level() or logging.WARNING) <= logging.WARNING:
        click.echo(f"xdit-compile: warning: {line}", err=True)
