"""The sizes and numbers of prompts that commands look at calls with."""

from __future__ import annotations

from collections.abc import Sequence

from xdit_compile.errors import UsageError


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
