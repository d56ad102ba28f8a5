"""Serves a pipeline over HTTP."""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from xdit_compile.cache.folder import resolve
from xdit_compile.cli.options.flags import model_flags, run_flags
from xdit_compile.cli.options.plan_flags import plan_flags
from xdit_compile.cli.options.preflight import preflight
from xdit_compile.cli.parsing.choices import Choices
from xdit_compile.cli.parsing.groups import SERVICE, Command, option
from xdit_compile.cli.processes.ending import compilers_apart
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.serving.request import LOG_FORMATS, ServeRequest

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "psutil", "pythonjsonlogger")


@click.command(cls=Command)
@model_flags
@run_flags
@plan_flags
@option("--host", group=SERVICE, default=ServeRequest.host, help="Address to listen at; 0.0.0.0 for all.")
@option("--port", group=SERVICE, type=int, default=ServeRequest.port, help="0 takes a free one, and says which.")
@option(
    "--max_batch",
    group=SERVICE,
    type=int,
    default=ServeRequest.max_batch,
    help="Calls of the denoiser that run as one, and requests at work at the same time.",
)
@option(
    "--max_wait_ms",
    group=SERVICE,
    type=float,
    default=ServeRequest.max_wait_ms,
    help="An idle server waits so long for others before it begins a request.",
)
@option("--max_queue", group=SERVICE, type=int, default=ServeRequest.max_queue, help="More that wait are answered 429.")
@option(
    "--retry",
    group=SERVICE,
    type=int,
    is_flag=False,
    flag_value=1,
    default=ServeRequest.retry,
    help="How often a request begins again after a process was lost.  [without N: 1]",
)
@option("--drain", group=SERVICE, type=float, default=ServeRequest.drain, help="Seconds to end requests at SIGTERM.")
@option(
    "--start_timeout",
    group=SERVICE,
    type=float,
    default=ServeRequest.start_timeout,
    help="Seconds in which the processes have to load the pipeline.",
)
@option(
    "--api_key_file",
    group=SERVICE,
    type=click.Path(),
    help="File of the key that requests must bring; else XDIT_COMPILE_API_KEY.",
)
@option(
    "--cors_origin",
    group=SERVICE,
    multiple=True,
    help="Let pages of this origin send requests; give it again for more.",
)
@option("--log_format", group=SERVICE, type=Choices(LOG_FORMATS), default=ServeRequest.log_format, help="On stderr.")
def serve(plan: Plan, nproc: int | None, **flags: Any) -> None:
    """Serve a pipeline over HTTP, as OpenAI's clients call it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}: pip install 'xdit-compile[serve]'")
    world = World.from_environment()
    request = ServeRequest(plan=plan, **flags).with_method(world, nproc)
    request.check(world, nproc)
    preflight(request, world, nproc)
    from xdit_compile.serving.run import serve as run

    run(request, nproc or 1)


@click.command(name="serve_rank", hidden=True)
@click.argument("max_batch", type=int)
@click.argument("request_json")
def serve_rank(max_batch: int, request_json: str) -> None:
    """One of the processes that a server starts."""
    from xdit_compile.cli.processes.launch import end_with_parent
    from xdit_compile.serving.ranks.rank import serve_rank as run

    end_with_parent()
    request = ServeRequest.from_json(request_json)
    with compilers_apart(resolve(request.plan.cache)):
        run(request, World.from_environment(), max_batch)
