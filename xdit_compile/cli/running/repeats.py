"""Calls of a pipeline as often as a request asks for: prompts in batches, timed runs, the same bytes, a trace of one
step."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np

from xdit_compile.cli.inputs.given import further_arguments, naming_assignments, pictures, put_scheduler
from xdit_compile.cli.options.request import Request
from xdit_compile.distributed.world import World
from xdit_compile.errors import XditCompileError

from .output import Latents, Pixels, difference, latents_of, pixels_of
from .pipeline_call import call_arguments, call_pipeline, say

_TRACED_STEP = 1
"""Steps before the one that is traced: the first call of a denoiser is unlike the others."""


def repeated(
    pipe: Any, arguments: dict[str, Any], request: Request, world: World
) -> tuple[Pixels | Latents, list[float]]:
    """Call a pipeline as often as a request asks for, and say what each time took.

    Args:
        arguments: those of ``call_arguments``.

    Returns:
        What the first run made, and the seconds of each.

    Raises:
        XditCompileError: runs were to give the same bytes, and do not; or no step could be traced.
    """
    for _ in range(request.warmup_calls):
        once(pipe, arguments, request)
    made, first = once(pipe, arguments, request)
    seconds = [first]
    if request.runs > 1:
        say(world, f"run 1 of {request.runs}: {first:.2f} s")
    for run in range(2, request.runs + 1):
        again, took = once(pipe, arguments, request)
        seconds.append(took)
        say(world, f"run {run} of {request.runs}: {took:.2f} s")
        if request.determinism_check:
            _check_same(made, again, run, world)
    if request.runs > 1:
        low, high = min(seconds), max(seconds)
        say(world, f"median {statistics.median(seconds):.2f} s of {request.runs} runs, {low:.2f} to {high:.2f} s")
    if request.determinism_check:
        say(world, f"the bytes of {request.runs} runs are the same on every rank")
    if request.profile is not None:
        _trace(pipe, arguments, request, world)
    return made, seconds


def prepared(pipe: Any, request: Request) -> tuple[dict[str, Any], list[str]]:
    """Put the scheduler that is asked for in place, and return what `call_arguments` does, pictures among it.

    Raises:
        UsageError, XditCompileError: as `call_arguments`, `put_scheduler`, `pictures` and `further_arguments` do.
    """
    put_scheduler(pipe, request.scheduler)
    others = {**pictures(request, request.height, request.width), "strength": request.strength}
    return call_arguments(pipe, request, **{**others, **further_arguments(pipe, request)})


def once(pipe: Any, arguments: dict[str, Any], request: Request) -> tuple[Pixels | Latents, float]:
    """Everything that a request asks for, and the seconds of all calls."""
    made, seconds = [], 0.0
    for batch, seeds in _batches(arguments, request):
        with naming_assignments(request):
            result, took = call_pipeline(pipe, batch, seeds)
        made.append(made_of(request, result))
        seconds += took
    if len(made) == 1:
        return made[0], seconds
    return dataclasses.replace(made[0], values=np.concatenate([each.values for each in made])), seconds


def made_of(request: Request, result: Any) -> Pixels | Latents:
    """What a request asked for, in a pipeline's result."""
    return latents_of(result) if request.output_type == "latent" else pixels_of(result)


def _batches(arguments: dict[str, Any], request: Request) -> Iterator[tuple[dict[str, Any], int | list[int]]]:
    """Arguments and seeds of each call."""
    size, prompts = request.batch_size or len(request.prompt), list(request.prompt)
    if size >= len(prompts):
        yield arguments, request.seeds
        return
    seeds = request.seeds if isinstance(request.seeds, list) else [request.seeds]
    each = len(seeds) // len(prompts)
    for first in range(0, len(prompts), size):
        some = prompts[first : first + size]
        own = seeds[first * each : (first + len(some)) * each]
        yield {**arguments, "prompt": some[0] if len(some) == 1 else some}, own[0] if len(own) == 1 else own


def _check_same(made: Pixels | Latents, again: Pixels | Latents, run: int, world: World) -> None:
    """See that two runs gave the same bytes; all ranks say so together.

    Raises:
        XditCompileError: naming the ranks where they did not.
    """
    import torch.distributed as dist

    same = made.values.shape == again.values.shape and made.values.tobytes() == again.values.tobytes()
    everyone = [None if same else str(difference(again, made))]
    if world.size > 1 and dist.is_initialized():
        everyone = [None] * world.size
        dist.all_gather_object(everyone, None if same else str(difference(again, made)))
    other = {rank: words for rank, words in enumerate(everyone) if words is not None}
    if other:
        raise XditCompileError(
            f"--determinism_check: run {run} gave other bytes than run 1 on rank {', '.join(map(str, other))}: "
            f"{next(iter(other.values()))}"
        )


def _trace(pipe: Any, arguments: dict[str, Any], request: Request, world: World) -> None:
    """Run once more, and write what rank 0 did from the end of one step of the scheduler to the end of the next.

    Raises:
        XditCompileError: the pipeline has no scheduler, or takes fewer steps.
    """
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    with _between_steps(pipe, profiler) if world.rank == 0 else contextlib.nullcontext([0, 0]) as steps:
        once(pipe, arguments, request)
    if world.rank == 0:
        if steps[0] <= _TRACED_STEP:
            raise XditCompileError(
                f"--profile: the pipeline took {steps[0]} steps, and the second is traced; give --num_inference_steps 2"
            )
        request.trace.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(request.trace))
        say(world, f"wrote {request.trace}: step {_TRACED_STEP + 1} of rank 0, for chrome://tracing or ui.perfetto.dev")


@contextlib.contextmanager
def _between_steps(pipe: Any, profiler: Any) -> Iterator[list[int]]:
    """Start a profiler once the scheduler ended some steps, and stop it after one more; yields how many it ended.

    Raises:
        XditCompileError: the pipeline has no scheduler.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise XditCompileError("--profile: the pipeline has no scheduler whose steps could be told apart")
    step, ended = scheduler.step, [0]

    def counted(*arguments: Any, **others: Any) -> Any:
        result = step(*arguments, **others)
        ended[0] += 1
        if ended[0] == _TRACED_STEP:
            profiler.start()
        elif ended[0] == _TRACED_STEP + 1:
            profiler.stop()
        return result

    scheduler.step = counted
    try:
        yield ended
    finally:
        del scheduler.step
        if ended[0] == _TRACED_STEP:
            profiler.stop()
