"""``python -m op_samples``: every operator of torch's samples, split every way; exit code 1 where one is wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .samples import MOST_SAMPLES, operators
from .table import table
from .work import run

FOLDER = Path(__file__).resolve().parent.parent.parent / ".op_samples"


@click.command(context_settings={"show_default": True, "max_content_width": 120})
@click.option("--only", multiple=True, help="This operator, as op_db names it; may be repeated.")
@click.option("--most", default=MOST_SAMPLES, help="Samples of one operator.")
@click.option("--jobs", default=1, help="Processes side by side.")
@click.option("--folder", default=FOLDER, type=click.Path(path_type=Path), help="Where what was found is kept.")
@click.option("--write", type=click.Path(path_type=Path), help="Write the table into this file.")
def main(only: tuple[str, ...], most: int, jobs: int, folder: Path, write: Path | None) -> None:
    """Split every operator every way on simulated ranks; goes on where it was stopped."""
    infos = operators(only)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(), transient=True) as progress:
        task = progress.add_task("operators", total=len(infos))
        outcomes = run(infos, folder, most, jobs, lambda name: progress.update(task, advance=1, description=name))
    page = table(outcomes)
    if write is not None:
        write.write_text(page)
    else:
        print(page)
    sys.exit(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
