"""Rows of an operand that ranks ask their neighbours for."""

from __future__ import annotations

import dataclasses

from xdit_compile.kernels.collectives.row_exchange import RowExchange
from xdit_compile.passes.axes.windows import HaloWindow


@dataclasses.dataclass(frozen=True)
class Request:
    """An exchange of rows, and what this rank sees then.

    ``needed`` is the same on every rank: whether any asks for rows that are not just its own.
    """

    rows: RowExchange
    seen: HaloWindow
    needed: bool
