"""One rank is perturbed at a random place of a random request: right on all ranks, or one error on all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pair
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo.pipelines import PIPELINES
from zoo.transformers import Draw

import xdit_compile
from xdit_compile import Plan

STEPS = 3
LIMIT_S = 20.0
KILLED_S = 8.0
EXACT = 2e-5

PLANS: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "tensor": {"tensor": 2},
    "cfg": {"cfg": 2},
    "data": {"data": 2},
    "pipefusion": {"pipefusion": 2, "warmup_steps": STEPS},
    "distrifusion": {"distrifusion": 2, "warmup_steps": STEPS},
    "vae": {"ulysses": 2, "vae": "patch"},
}
PLACES = ("prompt", "latents", "bar", "step", "callback", "result")
"""Where a rank may do something of its own: before the first call of the denoiser, in the loop, after the last."""
IN_LOOP = ("step", "callback")
OTHER: dict[str, dict[str, Any]] = {
    "seed": {"seed": 5},
    "steps": {"steps": STEPS + 1},
    "size": {"height": 128},
    "guidance": {"guidance_scale": 3.0},
    "prompt": {"scaled": 2.0},
    "rounding": {"scaled": 1 + 2e-7},
}
"""What a rank gives its pipeline that others do not."""


class Broken(Exception):
    """What a perturbed rank raises."""


class Ended(BaseException):
    """The same, of a kind that code rarely catches, as an interrupt from the keyboard is."""


def _raise(pipe: Any) -> None:
    raise Broken("here")


def _end(pipe: Any) -> None:
    raise Ended("here")


def _interrupt(pipe: Any) -> None:
    pipe._interrupt = True


def _read(pipe: Any) -> None:
    """A call of the denoiser that no other rank makes."""
    args = PIPELINES["sd3"].arguments(Draw(1))
    rows = torch.zeros(1, pipe.transformer.config.in_channels, 14, 22)
    pipe.transformer(rows, args["prompt_embeds"], args["pooled_prompt_embeds"], torch.ones(1))


DONE: dict[str, Callable[[Any], None]] = {
    "raise": _raise,
    "end": _end,
    "interrupt": _interrupt,
    "call": _read,
    "kill": lambda pipe: pair.kill_itself(),
    "stop": lambda pipe: pair.stop_for(1.5),
    "stop long": lambda pipe: pair.stop_for(18),
}
"""What a rank does at a place that others do not."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One perturbation: of which rank, how, where, and whether it hits the first request of a pipeline."""

    plan: str
    kind: str
    place: str = "callback"
    at: int = 0
    victim: int = 1
    fresh: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request: the difference to one process's picture, or what was raised."""

    difference: float | None
    error: str
    seconds: float

    @property
    def right(self) -> bool:
        return self.difference is not None and self.difference <= EXACT


# ---- in the two processes


def play(rank: int, memory: dict, scenario: Scenario) -> tuple[Outcome, Outcome]:
    """The perturbed request and the next one."""
    pipe = _pipeline(memory, scenario)
    mine = rank == scenario.victim
    do = DONE.get(scenario.kind) if mine else None
    with _at(pipe, scenario.place, scenario.at, do or (lambda pipe: None)):
        first = _request(rank, memory, pipe, scenario.plan, **(OTHER.get(scenario.kind, {}) if mine else {}))
    return first, _request(rank, memory, pipe, scenario.plan)


def _pipeline(memory: dict, scenario: Scenario) -> Any:
    kept, name = memory.setdefault("pipelines", {}), scenario.plan
    if scenario.fresh and name in kept:
        xdit_compile.restore(kept.pop(name))
    if name not in kept:
        limit = KILLED_S if scenario.kind == "kill" else LIMIT_S
        plan = Plan(**PLANS[name], backend="eager", timeout_s=limit)
        kept[name] = xdit_compile.parallelize(PIPELINES["sd3"].build(), plan)
    return kept[name]


def _request(rank: int, memory: dict, pipe: Any, plan: str, **other: Any) -> Outcome:
    begin = time.monotonic()
    try:
        found = _call(pipe, plan, **other)
    except BaseException as error:
        return Outcome(None, f"{type(error).__name__}: {error}", time.monotonic() - begin)
    expected = _expected(memory, plan)
    if found.shape != expected.shape:
        return Outcome(torch.inf, f"shape {tuple(found.shape)}", time.monotonic() - begin)
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    return Outcome(difference, "", time.monotonic() - begin)


def _call(pipe: Any, plan: str, seed: int = 0, steps: int = STEPS, scaled: float = 1.0, **more: Any) -> torch.Tensor:
    prompts = {name: value for name, value in PIPELINES["sd3"].arguments(Draw(0)).items() if "embeds" in name}
    prompts["prompt_embeds"] = prompts["prompt_embeds"] * scaled
    if plan == "data":
        prompts = {name: torch.cat([value, value.flip(-1)]) for name, value in prompts.items()}
        prompts["generator"] = [torch.Generator().manual_seed(seed + at) for at in range(2)]
    return PIPELINES["sd3"].call(
        pipe, seed, steps, "np" if plan == "vae" else "latent", callback_on_step_end=_after_step, **prompts, **more
    )


def _after_step(pipe: Any, step: int, time: Any, given: dict) -> dict:
    vars(pipe).get("after_step", lambda: None)()
    return {}


def _expected(memory: dict, plan: str) -> torch.Tensor:
    kept = memory.setdefault("expected", {})
    key = plan if plan in ("data", "vae") else "one"
    if key not in kept:
        kept[key] = _call(PIPELINES["sd3"].build(), plan)
    return kept[key]


@contextlib.contextmanager
def _at(pipe: Any, place: str, at: int, do: Callable[[Any], None]) -> Iterator[None]:
    """Have something done when a pipeline comes to a place, after it was there ``at`` times."""
    target, name = {
        "prompt": (pipe, "encode_prompt"),
        "latents": (pipe, "prepare_latents"),
        "bar": (pipe, "progress_bar"),
        "step": (pipe.scheduler, "step"),
        "callback": (pipe, "after_step"),
        "result": (pipe, "maybe_free_model_hooks"),
    }[place]
    own, been = getattr(target, name, lambda: None), itertools.count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(been) == at:
            do(pipe)
        return own(*args, **kwargs)

    vars(target)[name] = wrapped
    try:
        yield
    finally:
        del vars(target)[name]


# ---- in the parent

PAIR = pair.Pair()


def check(scenario: Scenario, ranks: pair.Pair = PAIR) -> None:
    """Both requests of a scenario are as they must be on two ranks.

    Raises:
        AssertionError: they are not.
    """
    if scenario.kind == "kill":
        ranks.end()
    found = ranks.run(play, scenario)
    said = f"{scenario}: {found}"
    if scenario.kind == "kill":
        assert found[scenario.victim] == pair.DIED, said
        for outcome in found[1 - scenario.victim]:
            assert f"rank {scenario.victim}" in outcome.error and outcome.seconds < KILLED_S + 8, said
        return
    firsts, seconds = zip(*found, strict=True)
    if scenario.kind in ("rounding", "stop"):
        assert all(outcome.right for outcome in firsts), said
    if not all(outcome.right for outcome in firsts):
        assert all(outcome.difference is None and outcome.seconds < LIMIT_S + 5 for outcome in firsts), said
        assert "rank " in firsts[1 - scenario.victim].error, said
        assert any(name in firsts[scenario.victim].error for name in ("rank ", "Broken", "Ended")), said
    assert all(outcome.right for outcome in seconds), said


def scenarios(kinds: Sequence[str]) -> st.SearchStrategy[Scenario]:
    """Perturbations of some kinds."""
    return st.builds(
        Scenario,
        plan=st.sampled_from(sorted(PLANS)),
        kind=st.sampled_from(kinds),
        place=st.sampled_from(PLACES),
        at=st.integers(0, STEPS - 1),
        victim=st.integers(0, 1),
        fresh=st.booleans(),
    ).map(_sensible)


def _sensible(drawn: Scenario) -> Scenario:
    """Places outside of the loop are come to once, and arguments differ from the start."""
    drawn = drawn if drawn.place in IN_LOOP else dataclasses.replace(drawn, at=0)
    return drawn if drawn.kind in DONE else dataclasses.replace(drawn, place="callback", at=0)


QUICK = ("raise", "end", "interrupt", "call", *OTHER)
CHECKED = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def end_the_pair() -> Iterator[None]:
    yield
    PAIR.end()


@given(scenarios(QUICK))
@settings(CHECKED, derandomize=True, max_examples=25)
def test_a_rank_that_differs_is_right_or_stops_all(scenario: Scenario) -> None:
    check(scenario)


@pytest.mark.slow
@given(scenarios((*QUICK, "stop")))
@settings(CHECKED, max_examples=250)
def test_many_ranks_that_differ(scenario: Scenario) -> None:
    check(scenario)


def test_data_ranks_compare_their_prompts() -> None:
    check(Scenario("data", "prompt"))


def test_a_rank_that_stops_for_a_while_does_not_matter() -> None:
    check(Scenario("ring", "stop", "step", at=1))


@pytest.mark.slow
@given(scenarios(("stop long",)))
@settings(CHECKED, max_examples=12)
def test_a_rank_that_stops_for_long(scenario: Scenario) -> None:
    check(scenario)


def test_a_rank_that_is_killed_is_named() -> None:
    check(Scenario("ulysses", "kill", "step", at=1))


def test_the_rank_that_keeps_the_store_is_named() -> None:
    others = pair.Pair(host=True)
    _, found = others.run(play, Scenario("ulysses", "kill", "step", at=1, victim=0))
    assert all("AgreementError" in each.error and "rank 0" in each.error for each in found), found


@pytest.mark.slow
@given(scenarios(("kill",)))
@settings(CHECKED, max_examples=24)
def test_ranks_that_are_killed(scenario: Scenario) -> None:
    check(scenario)
