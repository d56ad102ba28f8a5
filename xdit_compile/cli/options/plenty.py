"""Whether a request's memory is so far below what is there that nothing has to be counted. Reads file sizes alone."""

from __future__ import annotations

from pathlib import Path

from xdit_compile.plan.host import available_memory, free_on_cards, may_have_cuda
from xdit_compile.plan.packages import version_of
from xdit_compile.weights.model_folder import WEIGHTS, makes_videos

from .request import DTYPES, PipelineRequest, Request, find_model

BYTES_PER_PIXEL = 8192
"""More than autoencoders of diffusers take to decode a pixel in float32: 256 channels, several times."""
PROCESS = 2**30
"""Bytes of RAM that a process takes for Python, its libraries and what compiles, whatever the model."""
OWN_SIDE = 1024
"""Pixels of a side that was not asked for."""


def is_plenty(request: PipelineRequest, ranks: int, free: int | None = None) -> bool:
    """Whether a crude bound on what a rank takes is no more than half of what it has.

    Args:
        ranks: processes on this machine, which share its memory.
        free: bytes that a rank has elsewhere; None for one on this machine.
    """
    bound = _bound(request)
    if bound is None:
        return False
    there = [available_memory(ranks)] if free is None else [free]
    if free is None and uses_cuda(request):
        cards = free_on_cards()[:ranks]
        there += cards if len(cards) == ranks else [None]
    return all(each is not None and 2 * bound <= each for each in there)


def uses_cuda(request: PipelineRequest) -> bool:
    """Whether a request will be computed on what PyTorch calls CUDA, as far as that can be told without it."""
    return request.device != "cpu" and may_have_cuda() and not cpu_build()


def cpu_build() -> bool:
    """Whether the installed PyTorch was built for the CPU alone."""
    return (version_of("torch") or "").endswith("+cpu")


def _bound(request: PipelineRequest) -> int | None:
    """Bytes that are surely enough; None where the folder does not say."""
    folder = Path(find_model(request.model))
    images = _images(request)
    if not folder.is_dir() or images is None or makes_videos(folder):
        return None
    stored = sum(_weights(each) for each in folder.iterdir() if each.is_dir())
    widened = 2 if DTYPES.get(request.dtype, "float32") == "float32" else 1
    pixels = (request.height or OWN_SIDE) * (request.width or OWN_SIDE) * images
    return PROCESS + widened * stored + BYTES_PER_PIXEL * pixels


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)


def _images(request: PipelineRequest) -> int | None:
    if not isinstance(request, Request):
        return getattr(request, "batch_size", None)
    return None if request.num_frames else len(request.prompt) * (request.num_images_per_prompt or 1)
