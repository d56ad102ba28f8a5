"""Serves a pipeline over HTTP."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import sys
from typing import Any

import click

from xdit_compile.cli.options.flags import model_flags, run_flags
from xdit_compile.cli.options.plan_flags import plan_flags
from xdit_compile.cli.options.preflight import preflight
from xdit_compile.cli.options.request import Request
from xdit_compile.cli.parsing.choices import Choices
from xdit_compile.cli.parsing.groups import SERVICE, Command, option
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan import Plan
from xdit_compile.serving.request import LOG_FORMATS, ServeRequest

from .serve_on_ray import ClusterFlags, ray_flags, serve_on_ray

NEEDED = (
    "fastapi",
    "fastapi_offline",
    "uvicorn",
    "prometheus_client",
    "python_multipart",
    "psutil",
    "pythonjsonlogger",
)


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
@option(
    "--max_pixels",
    group=SERVICE,
    type=int,
    default=ServeRequest.max_pixels,
    help="Of one picture or frame; a request for more is refused.",
)
@option("--max_steps", group=SERVICE, type=int, default=ServeRequest.max_steps, help="The same of its steps.")
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
@option(
    "--plan",
    "plans",
    group=SERVICE,
    multiple=True,
    metavar="NAME=METHOD:N,...",
    help="Twice: latency=... for an idle server, throughput=... with replicas:N for a queue.",
)
@ray_flags
@option(
    "--with_parent", group=SERVICE, is_flag=True, help="End when standard input does, for programs that start this."
)
def serve(plan: Plan, nproc: int | None, with_parent: bool, **flags: Any) -> None:
    """Serve a pipeline over HTTP, as OpenAI's clients call it."""
    if with_parent:
        from xdit_compile.cli.processes.launch import stop_with_input

        stop_with_input()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}: pip install 'xdit-compile[serve]'")
    world = World.from_environment()
    cluster = ClusterFlags(*(flags.pop(field.name) for field in dataclasses.fields(ClusterFlags)))
    request = ServeRequest(plan=plan, **flags)
    cluster.check(request, world)
    if cluster.ray is not None:
        serve_on_ray(request, world, nproc, cluster)
        return
    request = request if request.plans else request.with_method(world, nproc)
    arrangements = request.arrangements
    is_launched = world.launched and world.size > 1
    if is_launched and request.plans:
        raise UsageError("--plan changes plans on one machine: start serve by itself, with --nproc")
    for arrangement in arrangements:
        _check(dataclasses.replace(request, plan=arrangement.plan), world, nproc, arrangement.gangs)
    if is_launched and world.rank > 0:
        from xdit_compile.serving.rank_process import be_rank

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a launcher's signals are for the front, which drains
        be_rank(request, world, None)
        return
    from xdit_compile.serving.run import serve as run

    here = os.environ.get("LOCAL_WORLD_SIZE") if is_launched else arrangements[0].ranks
    run(request, arrangements, os.environ["MASTER_ADDR"] if is_launched else None, int(here or 1))


def _check(request: ServeRequest, world: World, nproc: int | None, gangs: int) -> None:
    ranks = request.plan.world_size * gangs
    if request.plans and nproc != ranks:
        raise UsageError(f"--plan needs {ranks} processes; give --nproc {ranks}")
    of_gang = None if nproc is None else nproc // gangs
    request.check(world, of_gang)
    preflight(request, world, nproc)


@click.command(name="serve_room", hidden=True)
@click.option("--check", is_flag=True, help="Refuse what does not fit, as generate does.")
@click.argument("ranks", type=int)
@click.argument("request_json")
def serve_room(check: bool, ranks: int, request_json: str) -> None:
    """Says what a request takes on a rank, as JSON, for a server."""
    request = Request.from_json(request_json)
    if check:
        from xdit_compile.cli.running.check_room import check_room

        check_room(request, World.from_environment(), ranks, launches=True)
        return
    from xdit_compile.serving.ranks.needs import need_of

    click.echo(json.dumps(need_of(request)))


@click.command(name="serve_rank", hidden=True)
@click.argument("request_json")
def serve_rank(request_json: str) -> None:
    """One of the processes that a server starts."""
    from xdit_compile.cli.processes.launch import end_with_parent

    end_with_parent()
    from xdit_compile.serving.rank_process import be_rank

    be_rank(ServeRequest.from_json(request_json), World.from_environment(), json.loads(sys.stdin.readline()))
