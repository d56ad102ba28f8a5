"""``python -m conformance``: every pipeline under every plan; exit code 1 where one is wrong or crashed."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from conformance import digests
from conformance.document import document
from conformance.plans import PLANS
from conformance.runner import Cell, Limits, Store, cells, run
from conformance.shares import shares
from conformance.table import show
from conformance.verdicts import Answer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

FOLDER = digests.ROOT / ".conformance"


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--only", default="", help="Cases whose names contain this.")
@click.option("--plan", "plans", multiple=True, type=click.Choice(list(PLANS)), help="This plan; may be repeated.")
@click.option("--fresh", is_flag=True, help="Run cells anew that nothing has changed for.")
@click.option("--limit", default=120.0, help="Seconds for one cell, after which it counts as crashed.")
@click.option("--jobs", default=1, help="Pairs of processes side by side.")
@click.option("--minutes", type=float, help="Begin no cell after this time; with 0 show what is kept.")
@click.option("--device", default="cpu", help="Type of device to run on; 'pretend' is one without hardware.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the answers are kept.  [default: .conformance]")
@click.option("--report", type=click.Path(path_type=Path), help="Write all answers that are kept to this file.")
def main(
    only: str,
    plans: tuple[str, ...],
    fresh: bool,
    limit: float,
    jobs: int,
    minutes: float | None,
    device: str,
    folder: Path | None,
    report: Path | None,
) -> None:
    """Run every pipeline under every plan on two processes and compare it with one."""
    wanted = cells(only, plans)
    if not wanted:
        raise click.UsageError(f"no case has {only!r} in its name")
    console = Console(width=None if sys.stdout.isatty() else 150)
    limits = Limits(limit, min(60.0, limit), 60 * minutes if minutes is not None else float("inf"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("conformance", total=len(wanted))

        def done(cell: Cell, answer: Answer) -> None:
            progress.update(task, advance=1, description=f"{cell.case} {cell.plan}: {answer.verdict}")

        store = Store(folder or FOLDER / (device if device != "cpu" else ""))
        found = run(wanted, store, limits, jobs, fresh, done, device)
    show({cell: found[cell] for cell in wanted if cell in found}, console)
    if len(found) < len(wanted):
        console.print(f"{len(wanted) - len(found)} cells were not begun; run again to go on", highlight=False)
    kept = {cell: answer for cell in cells() if (answer := store.read(cell)) is not None}
    for share in shares(kept):
        console.print(f"of all exact methods' cells {share}", highlight=False)
    if report is not None:
        report.write_text(document(kept))
    sys.exit(any(answer.verdict.fault for answer in found.values()))


if __name__ == "__main__":
    main()
