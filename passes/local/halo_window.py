"""Rows of an operand that this rank sees, its own and those of its neighbours."""

from __future__ import annotations

import dataclasses

from xdit_compile.kernels.row_exchange import RowExchange
from xdit_compile.passes.axes.windows import Windows


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


@dataclasses.dataclass(frozen=True)
class Request:
    """An exchange of rows, and what this rank sees then.

    ``needed`` is the same on every rank: whether any asks for rows that are not just its own.
    """

    rows: RowExchange
    seen: HaloWindow
    needed: bool
