"""What a server and its ranks say on stderr: lines with their time, or JSON objects for a collector of logs."""

from __future__ import annotations

import logging

from pythonjsonlogger.json import JsonFormatter

from xdit_compile.cli.processes.speech import OURS, show_log
from xdit_compile.distributed.world import World

from .request import ServeRequest

FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s"


def show_logs(request: ServeRequest, world: World | None = None) -> None:
    """Show what is wanted of our own log, and of uvicorn's what is amiss.

    Args:
        world: the place of a rank; None for the front.

    Raises:
        UsageError: ``XDIT_COMPILE_LOG`` is no level.
    """
    if request.log_format == "json":
        formatter: logging.Formatter = JsonFormatter(
            FIELDS, static_fields={} if world is None else {"rank": world.rank}
        )
    else:
        formatter = logging.Formatter(FIELDS)
    show_log(request, world, formatter, logging.INFO if world is None else logging.WARNING)
    theirs = logging.getLogger("uvicorn")
    theirs.handlers, theirs.propagate = OURS.handlers, False
    theirs.setLevel(max(OURS.level, logging.WARNING))
