"""What was counted, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .counts import Code, Counted, Total

if TYPE_CHECKING:
    from rich.table import Table

COUNTED = "COUNTED, not measured on a card"
COLUMNS = (
    "calls", "kernels", "launches", "products", "MB", "GFLOP", "roofline us", "floor us", "registers", "stack B",
)  # fmt: skip


def table_of(rows: Sequence[Counted], title: str) -> Table:
    """A row for each structure, and one for all calls together."""
    from rich.table import Table

    table = Table("structure", title=title, title_justify="left", padding=0)
    for column in COLUMNS:
        table.add_column(column.replace(" ", "\n"), justify="right")
    for number, row in enumerate(rows):
        own = [str(row.code.registers), str(row.code.stack)]
        counts = [str(row.calls), str(len(row.code.kernels)), *_sums(row.code), *own]
        table.add_row(row.title, *counts, end_section=number == len(rows) - 1)
    total = Total.of(rows)
    table.add_row("all calls", str(total.calls), "", *_sums(total), "", "")
    return table


def _sums(of: Code | Total) -> list[str]:
    """Launches, products, MB, GFLOP, and both times."""
    times = [f"{seconds * 1e6:,.1f}" for seconds in (of.seconds, of.floor)]
    return [str(of.launches), str(of.products), f"{of.moved / 1e6:,.2f}", f"{of.flops / 1e9:,.1f}", *times]


def spills(rows: Sequence[Counted]) -> Iterator[str]:
    """A line for each kernel whose threads have memory beside their registers, or one that says there is none."""
    there = {kernel for row in rows for kernel in row.code.kernels if kernel.stack}
    for kernel in sorted(there, key=lambda kernel: kernel.name):
        yield f"{kernel.name}: {kernel.registers} registers of a thread, and {kernel.stack} bytes of stack"
    if not there:
        yield "no kernel has a stack: nothing is spilled"
