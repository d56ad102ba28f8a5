"""What an operator that looks at neighbours reads: for each row of its result a window of rows of its operand."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Windows:
    """The first and the last row that each row of a result reads; rows before the first or after the last are padding.

    Args:
        first, last: one entry per row of the result.
        middle: about which row of the operand each lies, never falling.
        size: rows of the operand.
    """

    first: np.ndarray
    last: np.ndarray
    middle: np.ndarray
    size: int

    @classmethod
    def sliding(cls, size: int, out: int, reach: int, stride: int, padding: int) -> Windows:
        """The windows of a convolution or pool.

        Args:
            size: rows of the operand.
            out: rows of the result.
            reach: rows from the first to the last that one row of the result reads.
            stride: rows of the operand from one window to the next.
            padding: rows of padding before the first row.
        """
        first = np.arange(out) * stride - padding
        return cls(first, first + reach - 1, first + (reach - 1) / 2, size)

    @classmethod
    def moved(cls, sources: np.ndarray, size: int, middle: np.ndarray | None = None) -> Windows:
        """Of an operator whose row ``i`` is row ``sources[i]`` of its operand, or padding where that is outside.

        Args:
            sources: one entry per row of the result.
            size: rows of the operand.
            middle: about which row of the operand each lies, never falling; ``sources`` where it is None.
        """
        return cls(sources, sources, sources if middle is None else middle, size)

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """The rows, as start and stop, that rows ``start`` to ``stop`` of the result read; padding is left out."""
        if stop <= start:
            return 0, 0
        first = max(int(self.first[start:stop].min()), 0)
        last = min(int(self.last[start:stop].max()), self.size - 1)
        return (first, last + 1) if last >= first else (0, 0)

    def ends(self, ends: tuple[int, ...]) -> tuple[int, ...]:
        """Where each rank's rows of the result should end so that most of what they read is its own.

        A row belongs to the rank that has the middle of its window.

        Args:
            ends: where each rank's rows of the operand end, in rank order.
        """
        out = len(self.first)
        return tuple(
            0 if end == 0 else out if end == self.size else int((self.middle < end - 0.5).sum()) for end in ends
        )


@dataclasses.dataclass(frozen=True)
class HaloWindow:
    """The rows ``start`` to ``stop`` of an operand that this rank has before it, for its rows ``first`` to ``last``
    (one past the last) of the result."""

    windows: Windows
    start: int
    stop: int
    first: int
    last: int

    @property
    def missing(self) -> tuple[int, int]:
        """Rows of padding that the windows reach over before and after those that are there."""
        if self.last == self.first:
            return 0, 0
        windows = slice(self.first, self.last)
        lowest, highest = int(self.windows.first[windows].min()), int(self.windows.last[windows].max())
        return max(self.start - lowest, 0), max(highest + 1 - self.stop, 0)
