"""The table of docs/operators.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from xdit_compile.passes.rules.registry import rulebook

from .splits import Outcome

RANDOM = "draws random numbers"
HEAD = """# Operators

Every operator of which PyTorch itself has samples (`torch.testing._internal.common_methods_invocations.op_db`), as
`PYTHONPATH=tests python -m op_samples --write docs/operators.md` found them: each sample is captured as a module whose
inputs are its tensors, split every way that its axes allow on 2, 3 and 5 simulated ranks, and compared with the
operator itself (2e-5 of the greatest value in float32, integers and truth values equal). Beside the plain call the
first samples are tried with one operand split and the others whole, laid out in memory otherwise (transposed, channels
last), written in place and with `out=` (all on 3 ranks), and operators of any shape with dims of no and of one
position. Operators that take no tensor (`ones`, `arange`) have nothing to split and are not counted.
`tests/kernels/test_op_samples.py` runs a selection of it; marked slow, all of it.
"""


def table(outcomes: Sequence[Outcome]) -> str:
    """The page, from what was found."""
    tried = [each for each in outcomes if not each.left_out]
    return "\n".join([HEAD, *_totals(outcomes, tried), *_wrong(outcomes), *_families(tried), *_left_out(outcomes)])


def _totals(outcomes: Sequence[Outcome], tried: Sequence[Outcome]) -> list[str]:
    gathered = sum(sum(each.gathered.values()) for each in tried)
    rows = [
        ("operators of `op_db`", len({each.operator for each in outcomes})),
        ("samples, in all forms", len(outcomes)),
        ("of these captured", len(tried)),
        ("splits", sum(each.splits for each in tried)),
        ("equal to the operator", sum(each.exact for each in tried)),
        ("gathered in these besides the result, each reason once a split", gathered),
        ("refused", sum(sum(each.refused.values()) for each in tried)),
        ("wrong", sum(len(each.wrong) for each in outcomes)),
    ]
    return ["| | |", "|---|---|", *(f"| {name} | {count:,} |" for name, count in rows), ""]


def _wrong(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [f"- {each.operator}, {each.form} {each.at}: {each.wrong[0]}" for each in outcomes if each.wrong]
    return ["## Wrong", "", *lines, ""] if lines else []


def _families(tried: Sequence[Outcome]) -> list[str]:
    """A row for each ATen operator with a rule, from the samples whose graph has it."""
    rules = rulebook()._rules
    found: dict[str, list[Outcome]] = defaultdict(list)
    for each in tried:
        for target in each.targets:
            found[target if target in rules else "pointwise"].append(each)
    lines = [
        "## Operators with a rule",
        "",
        "| ATen operator | samples | splits | exact | refused |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(set(found) & set(rules)):
        of = found[name]
        exact, refused = sum(each.exact for each in of), sum(sum(each.refused.values()) for each in of)
        lines.append(f"| `{name}` | {len(of)} | {sum(each.splits for each in of)} | {exact} | {refused} |")
    never = ", ".join(f"`{name}`" for name in sorted(set(rules) - set(found)))
    return [*lines, "", f"No sample has {never}.", "", *_reasons(tried)]


def _reasons(tried: Sequence[Outcome]) -> list[str]:
    gathered: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for each in tried:
        gathered.update({_short(reason): count for reason, count in each.gathered.items()})
        refused.update({_short(reason): count for reason, count in each.refused.items()})
    lines = ["## Gathered or refused, and why", "", "| reason | splits |", "|---|---|"]
    lines += [f"| gathered: {reason} | {count} |" for reason, count in gathered.most_common()]
    lines += [f"| refused: {reason} | {count} |" for reason, count in refused.most_common()]
    return [*lines, ""]


def _short(reason: str) -> str:
    """A reason without the numbers of one sample."""
    if reason.startswith("no rule for"):
        return "no rule for the operator"
    return re.sub(r"a\d+:\d+|\d+", "n", reason).replace("|", "/")[:120]


def _left_out(outcomes: Iterable[Outcome]) -> list[str]:
    reasons: dict[str, list[Outcome]] = defaultdict(list)
    for each in outcomes:
        if each.left_out:
            reasons[_why(each.left_out)].append(each)
    lines = ["## Left out", "", "| why | samples | operators |", "|---|---|---|"]
    for reason, of in sorted(reasons.items(), key=lambda item: -len(item[1])):
        names = sorted({f"{each.operator}" for each in of})
        shown = ", ".join(f"`{name}`" for name in names[:12]) + (
            f" and {len(names) - 12} more" if len(names) > 12 else ""
        )
        lines.append(f"| {reason} | {len(of)} | {shown} |")
    return [*lines, ""]


KINDS = {
    "Jiterator": "needs a GPU",
    "Sparse": "of sparse tensors, which have no positions to split",
    "torch refuses it": "PyTorch itself refuses this form: strides it cannot view, or another kind of `out`",
    "depends on|DataDependen|DynamicOutputShape|data-dependent": "not captured: a size depends on computed values",
    "whose output has alias annotations": "not captured: PyTorch cannot make this write a new value",
    "writes to": "not captured: it writes to one of its inputs, or has no functional form with `out`",
    "is no tensor but list": "not captured: a list within the tuple of its results",
    "instead of torch|differs from the module": "not captured: PyTorch records its `out` otherwise; comparing finds it",
}


def _why(left_out: str) -> str:
    kind = next((name for pattern, name in KINDS.items() if re.search(pattern, left_out)), None)
    return kind or re.sub(r"\s+", " ", left_out).replace("|", "/")[:160]
