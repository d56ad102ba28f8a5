"""Two processes of one thread each against one: seconds per denoising step, with sequence parallelism of several makes.

Everything runs the same diffusers denoiser with the same weights and inputs. What a contender computes is compared with
the unsplit module before anything is timed; then all contenders take turns, so that what else the machine does falls on
all of them.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import statistics
from importlib.metadata import version
from typing import Any

import click
import numpy as np
import torch
from contenders import REFERENCE, Contender, base, contenders
from denoiser import Size
from processes import Failed, Setting, Step, Team
from rich.console import Console
from rich.table import Table

TOLERANCE = 2e-5


@dataclasses.dataclass
class Entry:
    """What was found about one contender."""

    contender: Contender
    first_call_s: float = 0.0
    difference: float | None = None
    failure: str | None = None
    steps: list[Step] = dataclasses.field(default_factory=list)

    def median(self) -> float:
        return statistics.median(step.wall_s for step in self.steps)

    def ratio(self, to: Entry) -> float:
        """Median of the ratios round by round."""
        return statistics.median(a.wall_s / b.wall_s for a, b in zip(self.steps, to.steps, strict=True))

    def as_json(self, to: Entry) -> dict[str, Any]:
        found = {
            "name": self.contender.name,
            "processes": self.contender.processes,
            "failure": self.failure,
            "first_call_s": self.first_call_s,
            "difference": self.difference,
            "wall_s": [step.wall_s for step in self.steps],
            "cpu_s": [step.cpu_s for step in self.steps],
        }
        if self.steps:
            found |= {"median_s": self.median(), "least_s": min(step.wall_s for step in self.steps)}
            found |= {"ratio": self.ratio(to)}
        return found


@click.command()
@click.option("--backend", type=click.Choice(["inductor", "eager"]), default="inductor", show_default=True)
@click.option("--hidden", default=Size.hidden, show_default=True)
@click.option("--blocks", default=Size.blocks, show_default=True, help="Double and single blocks, half of each.")
@click.option("--tokens", default=Size.tokens, show_default=True, help="Image tokens; a square number.")
@click.option("--text", default=Size.text, show_default=True, help="Text tokens.")
@click.option("--head_dim", default=Size.head_dim, show_default=True)
@click.option("--batch", default=Size.batch, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Steps of each contender; all take one in each round.")
@click.option("--only", multiple=True, help="Run only contenders whose name contains this (and the base).")
@click.option("--profile", default=0, help="Also print this many rows of a profile of each contender.")
@click.option("--json", "json_file", type=click.Path(path_type=pathlib.Path), help="Write everything measured here.")
def main(
    backend: str,
    hidden: int,
    blocks: int,
    tokens: int,
    text: int,
    head_dim: int,
    batch: int,
    rounds: int,
    only: tuple[str, ...],
    profile: int,
    json_file: pathlib.Path | None,
) -> None:
    """Compare sequence parallelism on two processes with one process, step by step."""
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    try:
        setting = Setting(Size(hidden, blocks, tokens, text, head_dim, batch), backend)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    wanted = [entry for entry in contenders(backend) if _wanted(entry, only, backend)]
    teams = {count: Team(count, setting) for count in sorted({entry.processes for entry in wanted})}
    try:
        entries = _prepare(wanted, teams, console)
        _refuse_wrong(entries)
        load = os.getloadavg()[0]
        console.print(f"measuring {rounds} rounds; load average {load:.1f} on {os.cpu_count()} cores", highlight=False)
        _measure([entry for entry in entries if entry.failure is None], teams, rounds)
        for entry in entries:
            if profile and entry.failure is None:
                for text_table in teams[entry.contender.processes].profile(entry.contender.name, profile):
                    console.print(f"{entry.contender.name}\n{text_table}", markup=False, highlight=False)
    finally:
        for team in teams.values():
            team.close()
    to = next(entry for entry in entries if entry.contender.name == base(backend))
    console.print(_table(entries, to, setting, load))
    for entry in entries:
        if entry.failure is not None:
            console.print(f"not measured: {entry.contender.name}: {entry.failure}", markup=False, highlight=False)
    if json_file:
        found = {**_about(setting), "load_average": load, "contenders": [entry.as_json(to) for entry in entries]}
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _wanted(entry: Contender, only: tuple[str, ...], backend: str) -> bool:
    needed = (REFERENCE, base(backend))
    return not only or entry.name in needed or any(part in entry.name for part in only)


def _prepare(wanted: list[Contender], teams: dict[int, Team], console: Console) -> list[Entry]:
    """Build every contender and compare its result with the unsplit module's."""
    entries, expected = [], None
    for contender in wanted:
        entry = Entry(contender)
        entries.append(entry)
        try:
            result, entry.first_call_s = teams[contender.processes].prepare(contender.name)
            console.print(f"prepared in {entry.first_call_s:.1f} s: {contender.name}", highlight=False)
        except Failed as error:
            entry.failure = str(error)
            console.print(f"cannot run: {contender.name}", highlight=False)
            continue
        if expected is None:
            expected = result
        elif contender.exact:
            entry.difference = float(np.abs(result - expected).max() / np.abs(expected).max())
    return entries


def _refuse_wrong(entries: list[Entry]) -> None:
    for entry in entries:
        if entry.difference is not None and not entry.difference <= TOLERANCE:
            raise SystemExit(
                f"{entry.contender.name} is off the unsplit module by {entry.difference:.1e} of its largest value "
                f"(allowed {TOLERANCE:.0e}); nothing was timed"
            )


def _measure(entries: list[Entry], teams: dict[int, Team], rounds: int) -> None:
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(entries)
        for entry in entries:
            entry.steps.append(teams[entry.contender.processes].step(entry.contender.name))


def _table(entries: list[Entry], to: Entry, setting: Setting, load: float) -> Table:
    size = setting.size
    title = (
        f"{size.blocks} blocks, {size.hidden} hidden, {size.tokens} + {size.text} tokens, batch {size.batch}, fp32; "
        f"one thread per process;\n{len(to.steps)} interleaved rounds; load average {load:.1f}, {os.cpu_count()} cores"
    )
    table = Table("contender", title=title, title_justify="left")
    for column in ("processes", "median s", "least s", "cpu s", "ratio", "difference", "first call s"):
        table.add_column(column, justify="right")
    for entry in entries:
        name, count = entry.contender.name, str(entry.contender.processes)
        if entry.failure is not None:
            continue
        table.add_row(
            name,
            count,
            f"{entry.median():.3f}",
            f"{min(step.wall_s for step in entry.steps):.3f}",
            f"{statistics.median(step.cpu_s for step in entry.steps):.3f}",
            f"{entry.ratio(to):.3f}",
            "" if entry.difference is None else f"{entry.difference:.1e}",
            f"{entry.first_call_s:.1f}",
        )
    return table


def _about(setting: Setting) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "setting": dataclasses.asdict(setting),
        "versions": {name: version(name) for name in ("torch", "diffusers")} | {"python": platform.python_version()},
        "machine": {
            "cores": os.cpu_count(),
            "kind": platform.machine(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
        },
    }


if __name__ == "__main__":
    main()
