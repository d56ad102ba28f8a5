"""The table of cases and plans, and the reasons under it."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from conformance.runner import Cell
from conformance.verdicts import Answer, Verdict
from rich.console import Console
from rich.table import Table

_COLOURS = {
    Verdict.EXACT: "green", Verdict.INAPPLICABLE: "dim", Verdict.REFUSED: "yellow", Verdict.REPLICATED: "cyan",
    Verdict.WRONG: "bold red", Verdict.CRASHED: "red",
}  # fmt: skip


def show(found: Mapping[Cell, Answer], console: Console) -> None:
    """Print all answers: the table, what is no result and why, and totals."""
    plans = list(dict.fromkeys(cell.plan for cell in found))
    table = Table("case", *plans, padding=(0, 0))
    for case in dict.fromkeys(cell.case for cell in found):
        table.add_row(case, *(_shown(found.get(Cell(case, plan))) for plan in plans))
    console.print(table)
    for verdict in (Verdict.REFUSED, Verdict.WRONG, Verdict.CRASHED):
        _reasons(found, verdict, console)
    counts = collections.Counter(answer.verdict for answer in found.values())
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict)
    console.print(f"{len(found)} cells of {len({cell.case for cell in found})} pipelines: {total}", highlight=False)


def _shown(answer: Answer | None) -> str:
    if answer is None:
        return ""
    return f"[{_COLOURS[answer.verdict]}]{answer.verdict}[/]"


def _reasons(found: Mapping[Cell, Answer], verdict: Verdict, console: Console) -> None:
    grouped = collections.defaultdict(list)
    for cell, answer in found.items():
        if answer.verdict is verdict:
            grouped[answer.reason].append(f"{cell.case}/{cell.plan}")
    for reason, where in sorted(grouped.items(), key=lambda item: -len(item[1])):
        console.print(f"{verdict}: {', '.join(where)}: {reason}", style=_COLOURS[verdict], markup=False)
