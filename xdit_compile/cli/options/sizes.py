"""The sizes and numbers of prompts that commands look at calls with, and whether a model of the Hub has such sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from xdit_compile.errors import UsageError
from xdit_compile.weights.hub_files import fetched

from .request import PipelineRequest, find_model
from .result_kind import kind_in_folder


def check_batches(batches: Sequence[int]) -> None:
    """See that there is at least one prompt in every call.

    Raises:
        UsageError: there is none in one of them.
    """
    if any(batch < 1 for batch in batches):
        raise UsageError("--batch_size must be at least 1")


def size_in_pixels(text: str) -> tuple[int, int]:
    """Height and width, in pixels, of a text such as 1024x768.

    Raises:
        UsageError: it is none.
    """
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"--size {text} must be a height and a width in pixels, such as 1024x768")
    return int(sides[0]), int(sides[1])


def check_on_hub(request: PipelineRequest) -> None:
    """See that a model of the Hub makes what is asked for, before its weights are fetched.

    Raises:
        UsageError: it does not.
        XditCompileError: its configurations cannot be fetched.
    """
    if (folder := check_sizes_on_hub(request)) is not None:
        request.check_kind(kind_in_folder(folder))


def check_sizes_on_hub(request: PipelineRequest, sizes: Sequence[tuple[int, int]] = ()) -> Path | None:
    """Fetch the configurations of a model of the Hub, and see that it makes pictures of the sizes that are asked for.

    Args:
        request: its size is the first of them.
        sizes: more of them, height and width in pixels.

    Returns:
        The folder of the configurations; None where the model lies in a folder here, which the request looks at itself.

    Raises:
        UsageError: it does not; names the nearest sizes that work.
        XditCompileError: they cannot be fetched.
    """
    if Path(name := find_model(request.model)).is_dir():
        return None
    folder = fetched(name, request.download_dir)
    for height, width in [(request.height, request.width), *sizes]:
        dataclasses.replace(request, height=height, width=width).check_size(folder)
    return folder
