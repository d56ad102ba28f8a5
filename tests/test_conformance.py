"""The conformance runner, and the runner itself: a fault must not pass for a result."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import types
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pretend
import pytest
import torch
from conformance import absent as absence
from conformance import classes, digests, pair, runner
from conformance.case import Case
from conformance.cases import CASES, MODULES
from conformance.compare import TOLERANCE, Difference, compare, plain
from conformance.document import document
from conformance.observe import BrokenCase, observe, reference
from conformance.pair import Pair
from conformance.plans import PLANS
from conformance.quick import EXACT, QUICK, REFUSED
from conformance.runner import Cell, Limits, Store
from conformance.shares import shares
from conformance.verdicts import Answer, Verdict, joined
from conformance.work import components
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import nn

from xdit_compile.runtime.diffusers_pipeline import denoisers

GOOD = (Verdict.EXACT, Verdict.REFUSED, Verdict.INAPPLICABLE)


@pytest.mark.parametrize("chosen", [QUICK, pytest.param(EXACT, marks=pytest.mark.slow)], ids=["quick", "more"])
def test_a_choice_of_pipelines_under_every_plan(tmp_path: Path, chosen: Sequence[tuple[str, str]]) -> None:
    """On devices that take no tensor of another, nor one of the host."""
    exact = [Cell(*each) for each in chosen]
    wanted = [*exact, *(Cell(*each) for each in REFUSED[: len(exact) - len(QUICK) + 1])]
    device = "cpu" if pretend.unavailable() else pretend.NAME
    found = runner.run(wanted, Store(tmp_path), Limits(), device=device)
    assert set(found) == set(wanted) and (chosen is QUICK or {cell.plan for cell in exact} == set(PLANS))
    good = {cell: (Verdict.EXACT,) if cell in exact else GOOD for cell in wanted}
    faults = {cell: answer for cell, answer in found.items() if answer.verdict not in good[cell]}
    assert {cell: (answer.verdict, answer.reason) for cell, answer in faults.items()} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_measure(name: str) -> None:
    """It repeats itself, and other weights of its denoisers make another picture."""
    case = CASES[name]
    expected, pipe = reference(case, 1).results[0], case.build()
    for _, module in denoisers(pipe):
        for weight in module.parameters():
            weight.data.mul_(1.05)
    into = Difference()
    compare(observe(case, pipe, 0, 1), expected, into)
    assert into.greatest > 100 * TOLERANCE or into.levels > 10


@pytest.mark.slow
def test_every_class_has_a_case_or_a_reason() -> None:
    made = [case.build() for case in CASES.values()]
    pipelines = {type(each).__name__ for each in made if not isinstance(each, nn.Module)}
    modules = {type(part).__name__ for each in made for part in components(each).values()}
    absent = [{name for names in kind.values() for name in names} for kind in (absence.PIPELINES, absence.MODULES)]
    assert len(pipelines) >= 90
    assert classes.pipelines() - pipelines == absent[0] and not pipelines & absent[0]
    assert classes.networks() - modules == absent[1] and not modules & absent[1]


# ---- verdicts


def test_the_worst_rank_decides() -> None:
    exact, wrong = Answer(Verdict.EXACT, work=0.5), Answer(Verdict.WRONG, "far")
    refused = Answer(Verdict.REFUSED, "why")
    assert joined([exact, exact]).verdict is Verdict.EXACT
    assert joined([exact, wrong]).verdict is Verdict.WRONG
    assert joined([refused, refused]).verdict is Verdict.REFUSED
    assert joined([refused, refused]).reason == "why" and joined([exact, wrong]).reason == "rank 1: far"
    assert joined([exact, refused]).verdict is Verdict.CRASHED
    assert joined([exact, dataclasses.replace(exact, work=0.76)]).verdict is Verdict.REPLICATED


def difference(found: Any, expected: Any) -> Difference:
    into = Difference()
    compare(plain(found), plain(expected), into)
    return into


def test_results_differ_by_values_types_and_fields() -> None:
    picture = np.linspace(0, 1, 48, dtype=np.float32).reshape(1, 4, 4, 3)
    expected = StableDiffusionPipelineOutput(images=picture, nsfw_content_detected=None)
    assert difference(StableDiffusionPipelineOutput(images=picture, nsfw_content_detected=None), expected).exact
    assert not difference((picture, None), expected).exact
    assert not difference(StableDiffusionPipelineOutput(images=picture, nsfw_content_detected=[False]), expected).exact
    assert difference(picture + 1e-5, picture).exact and not difference(picture + 3e-5, picture).exact
    assert not difference(picture.astype(np.float64), picture).exact
    assert not difference(np.full_like(picture, np.nan), picture).exact
    assert not difference(picture[:, :2], picture).exact
    levels = (picture * 255).astype(np.uint8)
    assert difference(levels[:, ::1] | 1, levels).exact and not difference(levels ^ 2, levels).exact


class Drawing:
    """A pipeline that draws, whatever it is asked."""

    components: dict[str, Any] = {}

    def __init__(self, values: Any) -> None:
        self.values = values

    def set_progress_bar_config(self, **config: Any) -> None:
        pass

    def to(self, device: str) -> Drawing:
        return self

    def __call__(self) -> Any:
        return next(self.values)


@pytest.mark.parametrize(
    ("values", "why"),
    [((1.0, 2.0, 3.0), "another result"), ((1.0, 1.0, 1.0), "the same"), ((1.0, np.nan, 1.0), "finite")],
)
def test_a_case_that_is_no_measure_says_so(values: tuple[float, ...], why: str) -> None:
    def make() -> Drawing:
        return Drawing(iter([np.full(2, value) for value in values]))

    with pytest.raises(BrokenCase, match=why):
        reference(Case("drawing", make, lambda d, request: {}), 1)


class Steep(Drawing):
    """A pipeline whose weight is all but lost in a difference."""

    def __init__(self) -> None:
        self.components = {"transformer": nn.Linear(1, 1, bias=False)}
        self.components["transformer"].weight.data.fill_(1.0)

    def __call__(self, size: int) -> Any:
        weight = self.components["transformer"].weight.detach()
        return torch.cat([(weight - 0.9999) * size, weight]).numpy()


def test_a_case_that_magnifies_rounding_is_no_measure() -> None:
    for size, broken in ((1, False), (100_000, True)):
        case = Case("steep", Steep, lambda d, request, size=size: {"size": size * (request + 1)})
        with pytest.raises(BrokenCase, match="last bit") if broken else contextlib.nullcontext():
            assert reference(case, 1).rounding < 1e-6


# ---- what users read


def test_the_document_counts_names_and_gives_reasons() -> None:
    classes = {"subject": "FluxPipeline", "modules": ("FluxTransformer2DModel",)}
    reason = "PlanError: one | [two]"
    found = {
        Cell("flux", "ring"): Answer(Verdict.EXACT, **classes),
        Cell("flux", "tensor"): Answer(Verdict.REFUSED, reason, **classes),
        Cell("flux", "pipefusion"): Answer(Verdict.CRASHED, "hang", **classes),
        Cell("flux", "cfg"): Answer(Verdict.INAPPLICABLE, "no guidance", **classes),
        Cell("AutoencoderTiny", "vae"): Answer(Verdict.REPLICATED, "0.90", subject="AutoencoderTiny"),
    }
    text = document(found)
    assert document(dict(reversed(found.items()))) == text
    row = "| FluxPipeline | flux | not run | exact | refused [{}](#reasons) | n/a [{}](#reasons) | not run |"
    assert row.format(1, 2) + " **crashed** [3](#reasons) | not run | not run |" in text
    assert r"1. PlanError: one \| \[two\]" in text and "| FluxTransformer2DModel | flux |" in text
    assert f"| all | 1 | 1 | 1 | 1 | 0 | 1 | {len(CASES) * len(PLANS) - 5} |" in text
    held = {share.verdict: (share.count, share.applicable, share.holds) for share in shares(found)}
    assert held[Verdict.REFUSED] == (1, 3, False) and held[Verdict.CRASHED] == (0, 3, True)
    assert "refused: 1 of 3, 33.3 %, at most 5 %: does NOT hold" in text


# ---- modules by themselves


def test_a_module_by_itself_is_called_as_it_is_by_default() -> None:
    tiny, steered = CASES["AutoencoderTiny"], CASES["SD3MultiControlNetModel"]
    coded, states = tiny.call(tiny.build(), 0), steered.call(steered.build(), 0)
    assert type(coded["encoded"]).__name__ == "AutoencoderTinyOutput" and isinstance(states, tuple)
    assert coded["decoded"].sample.shape[-2:] == (44, 24)
    lone = reference(tiny, 1)
    assert lone.codes and lone.work.done["coding"] and not lone.work.done["denoising"]


# ---- what runs again


def counting(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replace the pair by one that only notes what it was asked."""
    asked: list[tuple[str, str]] = []

    class Stub:
        def __init__(self, *limits: float):
            pass

        def ask(self, case: str, plan: str) -> Answer:
            asked.append((case, plan))
            return Answer(Verdict.EXACT, differences=(0.0, 1e-7), work=0.5)

        def close(self) -> None:
            pass

    monkeypatch.setattr(runner, "Pair", Stub)
    return asked


def test_only_what_changed_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counting(monkeypatch)
    cells, store = [Cell("flux", "ring"), Cell("sd15", "ring")], Store(tmp_path)
    first = runner.run(cells, store, Limits())
    assert len(asked) == 2 and runner.run(cells, store, Limits()) == first and len(asked) == 2
    definition = digests.definition
    monkeypatch.setattr(digests, "definition", lambda name, module: definition(name, module) + "!" * (name == "flux"))
    runner.run(cells, store, Limits())
    assert asked[2:] == [("flux", "ring")]
    runner.run(cells, store, Limits(), fresh=True)
    assert len(asked) == 5
    assert runner.run([Cell("flux", "cfg")], store, Limits(total=0.0)) == {}


FAMILY = """
from conformance.parts import IMAGE
SIZE = {size}
def _make(): return {made}
def _other(): return 3
CASES = [Case("one", _make, SIZE), Case("two", _other, 1)]
"""


def family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, **values: str) -> dict[str, str]:
    path = tmp_path / f"family{number}.py"
    path.write_text(FAMILY.format(**values))
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    monkeypatch.setitem(sys.modules, path.stem, module)
    return {name: digests.definition(name, module) for name in ("one", "two")}


def test_a_case_changes_with_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = family(monkeypatch, tmp_path, 0, size="4", made="2")
    assert family(monkeypatch, tmp_path, 1, size="4", made="2") == first
    for number, changed in enumerate(({"size": "5", "made": "2"}, {"size": "4", "made": "7"})):
        other = family(monkeypatch, tmp_path, 2 + number, **changed)
        assert other["one"] != first["one"] and other["two"] == first["two"]


def test_every_case_has_a_definition_of_its_own() -> None:
    assert len({digests.definition(name, MODULES[name]) for name in CASES}) == len(CASES)


# ---- processes that do not answer


def faulty(rank: int, folder: str, asked: Connection, timeout_s: float) -> None:
    """A rank that does what the name of the case says."""
    asked.send("ready")
    while True:
        case, _ = asked.recv()
        if rank and case == "hang":
            time.sleep(600)
        if rank and case == "die":
            sys.exit(3)
        asked.send(Answer(Verdict.REFUSED if case == "hang" else Verdict.EXACT, case))


def test_a_rank_that_hangs_or_dies_is_a_crash_and_the_next_cell_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "GRACE_S", 0.3)
    two = Pair(limit=60.0, timeout_s=60.0, serve=faulty)
    try:
        found = [two.ask(case, "ring") for case in ("hang", "fine", "die", "fine")]
    finally:
        two.close()
    assert [answer.verdict for answer in found] == [Verdict.CRASHED, Verdict.EXACT, Verdict.CRASHED, Verdict.EXACT]
    assert "hang" in found[0].reason and "exit code 3" in found[2].reason
