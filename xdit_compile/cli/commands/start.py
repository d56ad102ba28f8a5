"""A checked request runs in this process, or in processes that are started for it."""

from __future__ import annotations

import click

from xdit_compile.cli.options.evaluation_request import EvaluationRequest
from xdit_compile.cli.options.request import PipelineRequest, Request
from xdit_compile.distributed.world import World


def start(command: str, request: PipelineRequest, nproc: int | None) -> None:
    """Check a request, then run it here or in processes of its own."""
    world = World.from_environment()
    request.check(world, nproc)
    if nproc is None or nproc == 1:
        _run(request, world)
    else:
        from xdit_compile.cli.running.launch import launch

        launch(["worker", command, request.to_json()], nproc, request.debug)


def _run(request: PipelineRequest, world: World) -> None:
    if isinstance(request, EvaluationRequest):
        from xdit_compile.cli.running.evaluate import evaluate as compare

        compare(request, world)
    elif isinstance(request, Request):
        from xdit_compile.cli.running.generate import generate as make

        make(request, world)


@click.command(hidden=True)
@click.argument("command", type=click.Choice(["generate", "evaluate"]))
@click.argument("request_json")
def worker(command: str, request_json: str) -> None:
    """One of the processes that --nproc starts."""
    from xdit_compile.cli.running.launch import end_with_parent

    end_with_parent()
    kind: type[PipelineRequest] = EvaluationRequest if command == "evaluate" else Request
    _run(kind.from_json(request_json), World.from_environment())
