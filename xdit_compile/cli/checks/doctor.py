"""Looks at all that a run needs, and prints what it finds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from xdit_compile import __version__
from xdit_compile.errors import XditCompileError, one_line

from . import choices, devices, running, storage, versions
from .finding import MISSING, OK, STATES, WARN, Finding

if TYPE_CHECKING:
    from rich.console import Console

SILENCE_S = 4.0
"""Seconds after which a check that goes on says so."""
STYLES = {OK: "green", WARN: "yellow", MISSING: "red"}
WIDTH = 120
"""Letters of a line where no terminal has one."""
Check = Callable[[], Iterable[Finding]]


@dataclasses.dataclass(frozen=True)
class Section:
    """Checks that belong together.

    Args:
        name: their heading.
        checks: what is looked at.
        doing: what is said while that goes on.
        runs: whether it takes seconds, as it runs something.
    """

    name: str
    checks: Sequence[Check]
    doing: str
    runs: bool = False


def sections(cache_dir: str | None) -> list[Section]:
    """All that is looked at, what is quick first."""
    return [
        Section("versions", [versions.versions], "reading versions"),
        Section("cache", [lambda: storage.cache(cache_dir)], "looking at the cache"),
        Section("memory", [storage.memory], "looking at memory"),
        Section("compiler", [running.compiler], "compiling a small program"),
        Section("devices", [devices.devices], "importing torch, looking for cards"),
        Section("links", [devices.links], "asking how cards are connected"),
        Section("backends", [choices.backends], "looking at backends"),
        Section("attention", [choices.attention], "looking at attention providers"),
        Section("a small graph", [running.inductor], "compiling a small graph with inductor", runs=True),
        Section("processes", [running.processes], "having two processes join a group", runs=True),
    ]


def doctor(cache_dir: str | None, run: bool, as_json: bool) -> None:
    """Check everything, and print it as it comes.

    Args:
        cache_dir: the folder of compiled programs, where it is not the usual one.
        run: whether a small graph is compiled and processes are started.
        as_json: print one JSON object at the end in place of the report.

    Raises:
        XditCompileError: something that is required is missing.
    """
    from rich.console import Console

    console, told = Console(highlight=False), Console(stderr=True, highlight=False)
    by_section: dict[str, list[Finding]] = {}
    for section in sections(cache_dir):
        if section.runs and not run:
            continue
        with _doing(told, section):
            by_section[section.name] = [finding for check in section.checks for finding in _findings(check)]
        if not as_json and by_section[section.name]:
            _show(console, section.name, by_section[section.name])
    every = [finding for findings in by_section.values() for finding in findings]
    failing = [finding for finding in every if finding.fails]
    if as_json:
        sys.stdout.write(json.dumps(_plain(by_section, not failing), indent=2) + "\n")
    else:
        console.print(_summary(every, run), markup=False, soft_wrap=True)
    if failing:
        names = ", ".join(finding.name for finding in failing)
        raise XditCompileError(f"what is required is missing: {names}; what to do stands beside each")


def _findings(check: Check) -> Iterator[Finding]:
    """What a check finds; where it breaks off, that it did."""
    try:
        yield from check()
    except Exception as error:  # a broken installation raises anything
        name = getattr(check, "__name__", "check")
        said = f"could not be looked at: {type(error).__name__}: {one_line(error)}"
        yield Finding(name if name != "<lambda>" else "folder", MISSING, said, "install again (make env)", True)


@contextlib.contextmanager
def _doing(console: Console, section: Section) -> Iterator[None]:
    """Say what goes on: in a line that is wiped away on a terminal, elsewhere in one that stays where it takes long."""
    if console.is_terminal:
        with console.status(f"{section.doing} ..."):
            yield
        return
    ended, begun = threading.Event(), time.perf_counter()

    def tell() -> None:
        while not ended.wait(0.0 if section.runs and not told else SILENCE_S):
            told.append(f"{time.perf_counter() - begun:.0f} s")
            console.print(f"doctor: {section.doing} ... {told[-1]}", markup=False)

    told: list[str] = []
    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(console: Console, name: str, findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title=name, title_justify="left", expand=False)
    table.title_style = "bold"
    table.add_column(no_wrap=True, width=max(map(len, STATES)))
    table.add_column(no_wrap=True, width=18)
    table.add_column(overflow="fold")
    for finding in findings:
        said = Text(finding.said)
        if finding.remedy and finding.state != OK:
            said.append(f"\n-> {finding.remedy}", style="cyan")
        table.add_row(Text(finding.state, style=STYLES[finding.state]), Text(finding.name), said)
    if console.is_terminal:
        console.print(table, "")
        return
    written = io.StringIO()
    Console(file=written, width=WIDTH, highlight=False).print(table, "")
    console.file.write("\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n")


def _plain(by_section: dict[str, list[Finding]], fine: bool) -> dict[str, Any]:
    plain = {name: [dataclasses.asdict(finding) for finding in findings] for name, findings in by_section.items()}
    return {"version": __version__, "ok": fine, "checks": plain}


def _summary(findings: Sequence[Finding], run: bool) -> str:
    counts = {state: sum(finding.state == state for finding in findings) for state in STATES}
    said = f"{counts[OK]} ok, {counts[WARN]} to look at, {counts[MISSING]} missing"
    left = "" if run else "; a small graph and two processes were not tried (--no_run)"
    if any(finding.fails for finding in findings):
        return f"{said}{left}"
    return f"{said}, none of which is required{left}" if counts[MISSING] else f"{said}{left}"
