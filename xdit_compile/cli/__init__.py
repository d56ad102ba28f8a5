"""The command line; importing it imports nothing heavy."""

from __future__ import annotations


def entry() -> None:
    """The installed command."""
    from .main import entry as run

    run()
