"""The unsplit pipeline's answer to a request, in a process of its own: this one may hold a part of the weights only."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import sys
from concurrent.futures.process import BrokenProcessPool

from xdit_compile.cli.options.request import Request
from xdit_compile.distributed.world import World
from xdit_compile.errors import XditCompileError

from .output import Latents, Pixels
from .repeats import once, prepared


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
    from .pipeline_call import open_pipeline

    pipe, _ = open_pipeline(request, World.from_environment())
    pipe.set_progress_bar_config(disable=request.quiet or not sys.stderr.isatty())
    arguments, _ = prepared(pipe, request)
    return once(pipe, arguments, request)
