"""A pipeline of two processes of one thread each against one: seconds for steps after the warm-up.

Beside it the same with transfers stubbed out, a picture of when each stage was busy, and the idle share of simulated
schedules with equal stages.
"""

from __future__ import annotations

import pathlib

import click
from comparison import compare
from contenders import STEPS, pipefusion
from denoiser import Size
from processes import Setting, Team
from rich.console import Console
from rich.table import Table
from schedule import Span, idle_share, simulate

STAGES = (2, 4, 8)
SIMULATED_STEPS = 20


@click.command()
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="inductor", show_default=True)
@click.option("--hidden", default=Size.hidden, show_default=True)
@click.option("--blocks", default=Size.blocks, show_default=True, help="Double and single blocks, half of each.")
@click.option("--tokens", default=Size.tokens, show_default=True, help="Image tokens; a square number.")
@click.option("--rounds", default=7, show_default=True, help=f"Runs of {STEPS} steps of each contender.")
@click.option("--timeline", type=click.Path(path_type=pathlib.Path), help="Draw when each stage was busy.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    backend: str, hidden: int, blocks: int, tokens: int, rounds: int, timeline: pathlib.Path | None,
    json_file: pathlib.Path | None,
) -> None:  # fmt: skip
    """Compare a pipeline over two processes with one process, run by run."""
    try:
        setting = Setting(Size(hidden, blocks, tokens), backend, suite="pipefusion")
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    console = Console()
    _print_simulated(console)
    wanted = pipefusion(backend)
    drawn = [entry.name for entry in wanted if entry.processes == 2 and not entry.stub]

    def after(teams: dict[int, Team]) -> None:
        found = {}
        for name in drawn:
            teams[2].step(name)
            found[name] = teams[2].spans(name)
            console.print(f"{name}: idle share {idle_share(found[name]):.3f} of the latest run", highlight=False)
        if timeline is not None:
            draw(found, timeline)

    compare(wanted, wanted[1].name, setting, rounds, json_file=json_file, after=after)


def _print_simulated(console: Console) -> None:
    table = Table("stages", title=f"idle share, simulated, {SIMULATED_STEPS} steps", title_justify="left")
    for times in (1, 2):
        table.add_column("patches: stages" if times == 1 else "patches: twice as many", justify="right")
    for stages in STAGES:
        shares = [idle_share(simulate(stages, times * stages, SIMULATED_STEPS)) for times in (1, 2)]
        table.add_row(str(stages), *(f"{share:.3f}" for share in shares))
    console.print(table)


def draw(found: dict[str, list[list[Span]]], path: pathlib.Path) -> None:
    """A row for each stage of each pipeline, a bar for each patch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(found), 1, figsize=(12, 1.6 * len(found)), squeeze=False)
    for (name, stages), panel in zip(found.items(), panels[:, 0], strict=True):
        first = min(spans[0][0] for spans in stages)
        count = len(stages[0]) // STEPS
        for stage, spans in enumerate(stages):
            for at, (begin, end) in enumerate(spans):
                shade = f"C{at // count % 2}"
                panel.barh(stage, end - begin, left=begin - first, color=shade, edgecolor="white", linewidth=0.4)
        panel.set(title=name, yticks=range(len(stages)), yticklabels=[f"stage {s}" for s in range(len(stages))])
        panel.invert_yaxis()
    panels[-1, 0].set_xlabel("seconds; the colour changes from step to step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
