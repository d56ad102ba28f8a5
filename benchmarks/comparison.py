"""Comparing contenders: results first, then steps in turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import random
import statistics
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from contenders import Contender
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


def compare(
    wanted: list[Contender],
    base: str,
    setting: Setting,
    rounds: int,
    profile: int = 0,
    json_file: pathlib.Path | None = None,
    after: Callable[[dict[int, Team]], None] | None = None,
) -> None:
    """Prepare, check, measure and print; a contender's ratio is to its own base, or to ``base``.

    ``after`` may ask the processes for more, by their number, before they end.

    Raises:
        SystemExit: a contender computes something else; nothing is timed then.
    """
    console = Console()
    console = console if console.is_terminal else Console(width=140)
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
        if after is not None:
            after(teams)
    finally:
        for team in teams.values():
            team.close()
    by_name = {entry.contender.name: entry for entry in entries}
    bases = {entry.contender.name: by_name[entry.contender.base or base] for entry in entries}
    console.print(_table(entries, bases, setting, load))
    for entry in entries:
        if entry.failure is not None:
            console.print(f"not measured: {entry.contender.name}: {entry.failure}", markup=False, highlight=False)
    if json_file:
        found = [entry.as_json(bases[entry.contender.name]) for entry in entries]
        json_file.write_text(
            json.dumps({**_about(setting), "load_average": load, "contenders": found}, indent=1) + "\n"
        )


def _prepare(wanted: list[Contender], teams: dict[int, Team], console: Console) -> list[Entry]:
    """Build every contender and compare its result with the unsplit module's."""
    entries: list[Entry] = []
    results: dict[str, np.ndarray] = {}
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
        expected = results.get(contender.alike or wanted[0].name)
        if expected is not None and contender.exact:
            entry.difference = float(np.abs(result - expected).max() / np.abs(expected).max())
        results[contender.name] = result
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


def _table(entries: list[Entry], bases: dict[str, Entry], setting: Setting, load: float) -> Table:
    title = (
        f"{setting.size.title()}, fp32; "
        f"one thread per process;\n{len(entries[0].steps)} interleaved rounds; load average {load:.1f}, "
        f"{os.cpu_count()} cores"
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
            f"{entry.ratio(bases[name]):.3f}",
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
