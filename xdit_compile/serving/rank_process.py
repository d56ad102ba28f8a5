"""What a process does that is a rank of a server, whoever started it."""

from __future__ import annotations

import dataclasses
from typing import Any

from xdit_compile.cache.folder import resolve
from xdit_compile.cli.processes.ending import compilers_apart
from xdit_compile.distributed.world import World

from .logs import show_logs
from .ranks.rank import serve_rank
from .request import ServeRequest


def be_rank(request: ServeRequest, world: World, front: dict[str, Any] | None) -> None:
    """Serve until the front hangs up.

    Args:
        request: what the server was started with.
        world: this process's place among its ranks.
        front: where that is, as it tells those that it starts; None for a process that a launcher started.

    Raises:
        AgreementError: ranks did not meet in time.
    """
    show_logs(request, world)
    request = dataclasses.replace(request, quiet=request.quiet or request.log_format == "json")
    arrangements = request.arrangements
    request = dataclasses.replace(request, plan=arrangements[0].plan)
    plans = {arrangement.name: arrangement.plan for arrangement in arrangements}
    with compilers_apart(resolve(request.plan.cache)):
        serve_rank(request, world, request.max_batch, plans, front)
