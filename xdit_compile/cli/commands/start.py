"""A checked request runs in this process, or in processes that are started for it."""

from __future__ import annotations

import os
import time

import click

from xdit_compile.cache.folder import resolve
from xdit_compile.cli.options.evaluation_request import EvaluationRequest
from xdit_compile.cli.options.plenty import is_plenty
from xdit_compile.cli.options.preflight import preflight
from xdit_compile.cli.options.request import PipelineRequest, Request
from xdit_compile.cli.options.sizes import check_on_hub
from xdit_compile.cli.options.without_effect import tell_without_effect
from xdit_compile.cli.processes.ending import compilers_apart
from xdit_compile.cli.processes.speech import show_phases
from xdit_compile.distributed.world import World


def start(command: str, request: PipelineRequest, nproc: int | None) -> None:
    """Check a request, then run it here or in processes of its own."""
    world = World.from_environment()
    request = request.with_method(world, nproc)
    request.check(world, nproc)
    preflight(request, world, nproc)
    request = request.settled(world)
    if world.rank == 0:
        tell_without_effect(request)
    if request.method_chosen and world.rank == 0:
        degree = request.plan.ulysses
        line = f"no method was given for {degree} processes: taking --ulysses_degree {degree}, which shares the tokens"
        click.echo(line, err=True)
    begun, phases = time.monotonic(), show_phases(request, world)
    launches = nproc is not None and nproc > 1
    phases.begin(f"starting {nproc} processes" if launches else "starting")
    check_on_hub(request)
    with compilers_apart(resolve(request.plan.cache)):
        _check_room(request, world, nproc)
        if not launches:
            _run(request, world)
    if launches:
        from xdit_compile.cli.processes.launch import launch

        launch(["worker", "--since", str(begun), command, request.to_json()], nproc or 1, request.debug, phases.end)


def _check_room(request: PipelineRequest, world: World, nproc: int | None) -> None:
    """Refuse what will not fit into memory, once for the processes of this machine.

    Raises:
        UsageError: it will not.
    """
    ranks = nproc or int(os.environ.get("LOCAL_WORLD_SIZE") or world.size)
    if request.force or world.local_rank or is_plenty(request, ranks):
        return
    from xdit_compile.cli.running.check_room import check_room

    check_room(request, world, ranks, launches=nproc is not None and nproc > 1)


def _run(request: PipelineRequest, world: World) -> None:
    if isinstance(request, EvaluationRequest):
        from xdit_compile.cli.running.evaluate import evaluate as compare

        compare(request, world)
    elif isinstance(request, Request):
        from xdit_compile.cli.running.generate import generate as make

        make(request, world)


@click.command(hidden=True)
@click.option("--since", type=float, help="When the command began, by the monotonic clock.")
@click.argument("command", type=click.Choice(["generate", "evaluate"]))
@click.argument("request_json")
def worker(since: float | None, command: str, request_json: str) -> None:
    """One of the processes that --nproc starts."""
    from xdit_compile.cli.processes.launch import end_with_parent

    end_with_parent()
    kind: type[PipelineRequest] = EvaluationRequest if command == "evaluate" else Request
    request, world = kind.from_json(request_json), World.from_environment()
    show_phases(request, world, since).begin("starting")
    with compilers_apart(resolve(request.plan.cache)):
        _run(request, world)
