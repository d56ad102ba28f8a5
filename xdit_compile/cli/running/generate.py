"""One rank of a ``generate`` command: load, parallelize, run, write, compare."""

from __future__ import annotations

import gc

from xdit_compile.cli.options.request import Request
from xdit_compile.distributed.world import World

from .output import Latents, Pixels, difference, write
from .pipeline_call import call_arguments, call_pipeline, leave, open_parallel, placement, processes, say
from .unsplit_reference import made_of, reference


def generate(request: Request, world: World) -> None:
    """Make what the request asks for; rank 0 writes the file and speaks.

    Raises:
        XditCompileError: with a line that says what to change.
    """
    made = _made(request, world)
    leave()
    if request.compare and world.rank == 0:
        _give_back_memory(request, world)
        unsplit, seconds = reference(request)
        say(world, f"unsplit pipeline: {seconds:.1f} s on 1 process")
        say(world, f"split against unsplit: {difference(made, unsplit)}")


def _made(request: Request, world: World) -> Pixels | Latents:
    """What was asked for, written; nothing of the pipeline is held any more when this returns."""
    pipe = open_parallel(request, world)
    arguments, ignored = call_arguments(pipe, request)
    if ignored:
        say(world, f"ignored, this pipeline does not take them: {', '.join(ignored)}")
    pipe.set_progress_bar_config(disable=world.rank != 0)
    result, seconds = call_pipeline(pipe, arguments, request.seeds)
    made = made_of(request, result)
    if world.rank == 0:
        files = ", ".join(str(file) for file in write(made, request.file, request.fps))
        say(world, f"wrote {files}: {_describe(made)}, {seconds:.1f} s on {processes(world.size)}")
    return made


def _give_back_memory(request: Request, world: World) -> None:
    """End the pipeline, which modules and what stands in their place hold in circles, and what is kept of its memory.

    Another process is about to load a whole one on the same device.
    """
    from xdit_compile.ir.peak_memory import release_unused

    gc.collect()
    release_unused(placement(request, world)[0])


def _describe(made: Pixels | Latents) -> str:
    if isinstance(made, Latents):
        return f"latents of shape {list(made.values.shape)}"
    count, *frames, height, width, _ = made.values.shape
    kind = f"video of {frames[0]} frames" if frames else "image"
    return f"{count} {kind}{'s' if count > 1 and not frames else ''}, {width} x {height} pixels"
