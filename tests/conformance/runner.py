"""Runs cells on pairs of processes, keeps a file of each, and passes over those that nothing has changed for."""

from __future__ import annotations

import dataclasses
import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conformance import digests
from conformance.cases import CASES, MODULES
from conformance.pair import Pair
from conformance.plans import PLANS
from conformance.verdicts import Answer, Verdict
from conformance.worker import serve


@dataclasses.dataclass(frozen=True)
class Cell:
    """A case under a plan."""

    case: str
    plan: str

    @property
    def digest(self) -> str:
        """Of all that its verdict depends on."""
        definition = digests.definition(self.case, MODULES[self.case])
        return digests.cell(definition, repr((self.plan, PLANS[self.plan])))


class Store:
    """A folder with one JSON file a cell."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, cell: Cell) -> Answer | None:
        """What the cell came to, where that is still true."""
        path = self._path(cell)
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.pop("digest", None) != cell.digest:
            return None
        kept["verdict"] = Verdict(kept["verdict"])
        kept["differences"], kept["modules"] = tuple(kept["differences"]), tuple(kept["modules"])
        return Answer(**{field.name: kept[field.name] for field in dataclasses.fields(Answer)})

    def write(self, cell: Cell, answer: Answer) -> None:
        """Keep an answer; a run that is stopped leaves no half file."""
        path = self._path(cell)
        whole = {**dataclasses.asdict(cell), "digest": cell.digest, **dataclasses.asdict(answer)}
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(whole, indent=1) + "\n")
        unfinished.rename(path)

    def _path(self, cell: Cell) -> Path:
        return self._folder / f"{cell.case}.{cell.plan}.json"


def cells(only: str = "", plans: Sequence[str] = ()) -> list[Cell]:
    """The cells of all cases whose names contain ``only``, case by case."""
    return [Cell(case, plan) for case in CASES if only in case for plan in plans or PLANS]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds for a cell, for a rank to wait for the other, and for all cells together (after which none begins)."""

    cell: float = 120.0
    wait: float = 60.0
    total: float = float("inf")


def run(
    wanted: Sequence[Cell],
    store: Store,
    limits: Limits,
    jobs: int = 1,
    fresh: bool = False,
    done: Callable[[Cell, Answer], None] = lambda cell, answer: None,
    device: str = "cpu",
) -> dict[Cell, Answer]:
    """The answers of all cells that there was time for; ``done`` is told each, kept ones at once."""
    kept = {} if fresh else {cell: answer for cell in wanted if (answer := store.read(cell)) is not None}
    for cell, answer in kept.items():
        done(cell, answer)
    cases: queue.SimpleQueue[list[Cell]] = queue.SimpleQueue()
    for case in dict.fromkeys(cell.case for cell in wanted):
        cases.put([cell for cell in wanted if cell.case == case and cell not in kept])
    found, lock = dict(kept), threading.Lock()

    def note(cell: Cell, answer: Answer) -> None:
        with lock:
            store.write(cell, answer)
            found[cell] = answer
            done(cell, answer)

    end = time.monotonic() + limits.total
    with ThreadPoolExecutor(jobs) as pool:
        for each in [pool.submit(_work, cases, limits, end, note, device) for _ in range(jobs)]:
            each.result()
    return found


def _work(
    cases: queue.SimpleQueue[list[Cell]], limits: Limits, end: float, note: Callable[..., None], device: str
) -> None:
    """One pair, case after case, so that what a case is compared with is made once."""
    pair = Pair(limits.cell, limits.wait, functools.partial(serve, device=device))
    try:
        while not cases.empty() and time.monotonic() < end:
            try:
                group = cases.get_nowait()
            except queue.Empty:
                return
            for cell in group:
                if time.monotonic() >= end:
                    return
                note(cell, pair.ask(cell.case, cell.plan))
    finally:
        pair.close()
