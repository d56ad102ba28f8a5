"""The table that users search: every class, every plan, the reasons, and what is not there."""

from __future__ import annotations

import collections
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence

from conformance.absent import MODULES, PIPELINES
from conformance.alone import Alone, Coder
from conformance.cases import CASES
from conformance.plans import PLANS, STALE
from conformance.runner import Cell
from conformance.shares import shares, totals
from conformance.verdicts import Answer, Verdict

LIBRARIES = ("torch", "diffusers", "transformers")
LONGEST = 300
"""Characters of a reason that are kept."""

HEAD = """# Conformance

Made by `make conformance` from stored answers; do not edit. Pipelines of diffusers, built small and otherwise
unmodified, each by its default call: two requests, the second of another size where the pipeline takes sizes, on two
processes, compared with one process. Denoisers and autoencoders that none of these pipelines has are called by
themselves.

- **exact**: float32 values agree to 2e-5 of the greatest, or to four times what the last bit of the weights makes.
- **replicated**: exact, but a rank does more than three quarters of one process's arithmetic.
- **refused**: an error of one line that says what to do. **n/a**: there is nothing to split.
- **wrong**, **crashed**: faults. **not run**: no answer is stored for the present sources.

`{stale}` warm up in all steps here, where they are exact by definition; the parts below are of the
other methods.
"""


class Notes:
    """Reasons by number, in the order in which they are first used."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, reason: str) -> str:
        """The mark of a reason; nothing where there is none."""
        if not reason:
            return ""
        short = reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}…"
        number = self.numbers.setdefault(short, len(self.numbers) + 1)
        return f" [{number}](#reasons)"


def document(found: Mapping[Cell, Answer]) -> str:
    """Markdown of all answers; cells that have none are named as not run."""
    subjects = {case: _subject(case, found) for case in CASES}
    alone = {case for case, made in CASES.items() if isinstance(made, Alone | Coder)}
    notes = Notes()
    parts = [
        HEAD.format(stale="` and `".join(STALE)),
        _versions(),
        "## Totals\n",
        *_totals(found),
        *(f"- {share}" for share in shares(found)),
        "\n## Pipelines\n",
        *_table([case for case in CASES if case not in alone], subjects, found, notes),
        "\n## Denoisers and autoencoders by themselves\n",
        *_table(sorted(alone), subjects, found, notes),
        "\n## Denoisers and autoencoders in these pipelines\n",
        *_reached(found),
        "\n## Reasons\n",
        *(f"{number}. {_plain(reason)}" for reason, number in notes.numbers.items()),
        "\n## Not here\n",
        *_absent(PIPELINES),
        *_absent(MODULES),
    ]
    return "\n".join(parts) + "\n"


def _subject(case: str, found: Mapping[Cell, Answer]) -> str:
    """The class of a case's pipeline as its answers say it; its name where there are none."""
    names = [found[cell].subject for plan in PLANS if (cell := Cell(case, plan)) in found]
    return next((name for name in names if name), case)


def _versions() -> str:
    return "Versions: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES) + ".\n"


def _row(entries: Iterable[object]) -> str:
    return "| " + " | ".join(str(entry) for entry in entries) + " |"


def _head(entries: Sequence[str]) -> list[str]:
    return [_row(entries), _row("---" for _ in entries)]


def _totals(found: Mapping[Cell, Answer]) -> Iterator[str]:
    """One row a plan, and one of all."""
    counts, every = totals(found), collections.Counter(answer.verdict for answer in found.values())
    yield from _head(["plan", *(_name(verdict) for verdict in Verdict), "not run"])
    for plan, of_plan in counts.items():
        yield _row([plan, *(of_plan[verdict] for verdict in Verdict), len(CASES) - of_plan.total()])
    yield _row(["all", *(every[verdict] for verdict in Verdict), len(CASES) * len(PLANS) - every.total()])
    yield ""


def _table(
    cases: Sequence[str], subjects: Mapping[str, str], found: Mapping[Cell, Answer], notes: Notes
) -> Iterator[str]:
    """One row a case, by the name of its class."""
    yield from _head(["class", "case", *PLANS])
    for case in sorted(cases, key=lambda case: (subjects[case], case)):
        shown = [_shown(found.get(Cell(case, plan)), notes) for plan in PLANS]
        yield _row([subjects[case], "" if case == subjects[case] else case, *shown])


def _shown(answer: Answer | None, notes: Notes) -> str:
    if answer is None:
        return "not run"
    mark = "" if answer.verdict is Verdict.EXACT else notes.of(answer.reason)
    name = _name(answer.verdict)
    return f"**{name}**{mark}" if answer.verdict.fault else f"{name}{mark}"


def _name(verdict: Verdict) -> str:
    return "n/a" if verdict is Verdict.INAPPLICABLE else str(verdict)


def _plain(text: str) -> str:
    """What markdown would read is shown."""
    return " ".join(text.split()).translate(str.maketrans({each: f"\\{each}" for each in "<>*_|[]`"}))


def _reached(found: Mapping[Cell, Answer]) -> Iterator[str]:
    """The networks of pipelines by class, and the cases that have them."""
    cases = collections.defaultdict(set)
    for cell, answer in found.items():
        for name in answer.modules:
            if not isinstance(CASES[cell.case], Alone | Coder):
                cases[name].add(cell.case)
    yield from _head(["class", "cases"])
    for name in sorted(cases):
        yield _row([name, ", ".join(sorted(cases[name]))])


def _absent(classes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Why classes have no case."""
    for reason, names in classes.items():
        yield f"- {', '.join(names)}: {reason}."
