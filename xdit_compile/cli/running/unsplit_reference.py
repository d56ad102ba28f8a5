"""The unsplit pipeline's answer to a request, in a process of its own: this one may hold a part of the weights only."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from xdit_compile.cli.options.request import Request
from xdit_compile.distributed.world import World
from xdit_compile.errors import XditCompileError

from .output import Latents, Pixels, latents_of, pixels_of


def reference(request: Request) -> tuple[Pixels | Latents, float]:
    """What the unsplit pipeline makes of a request, and the seconds that its call took.

    Raises:
        XditCompileError: it could not be loaded or run, or its process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_unsplit, request).result()
        except BrokenProcessPool as error:
            raise XditCompileError(
                "the process of the unsplit pipeline was killed, most likely for want of memory; leave out --compare"
            ) from error


def _unsplit(request: Request) -> tuple[Pixels | Latents, float]:
    from .pipeline_call import call_arguments, call_pipeline, open_pipeline

    pipe, _ = open_pipeline(request, World.from_environment())
    arguments, _ = call_arguments(pipe, request)
    result, seconds = call_pipeline(pipe, arguments, request.seeds)
    return made_of(request, result), seconds


def made_of(request: Request, result: Any) -> Pixels | Latents:
    """What a request asked for, in a pipeline's result."""
    return latents_of(result) if request.output_type == "latent" else pixels_of(result)
