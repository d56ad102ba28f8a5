"""PipeFusion: patches in flight, stale keys and values as published, nothing more stale than that."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import procs
import pytest
import torch
from stale_reference import Reference
from zoo_pipelines import PIPELINES

import xdit_compile
from xdit_compile import Plan


def digest_of(name: str) -> Callable[[tuple, dict], Hashable]:
    """Branches by the sum of one argument, which differs between a prompt and its negative."""
    return lambda args, kwargs: float(kwargs[name].double().sum())


def grid(sizes: tuple[int, ...], cut: int, before: int = 0, after: int = 0) -> Any:
    """Positions of the patches of a flattened grid, cut along one of its dims, between tokens of the first patch."""

    def positions(held: list[torch.Tensor], tokens: int) -> list[torch.Tensor] | None:
        count = int(torch.tensor(sizes).prod())
        if tokens != before + count + after:
            return None
        numbers = torch.arange(count).reshape(sizes) + before
        found = [numbers.index_select(cut, each).flatten() for each in held]
        others = torch.cat([torch.arange(before), torch.arange(before + count, tokens)])
        return [torch.cat([others, found[0]]), *found[1:]]

    return positions


# name: patches of the result in pixels a token, tokens of the picture, branch
CASES: dict[str, tuple[int, Any, Callable[[tuple, dict], Hashable]]] = {
    "flux": (1, grid((77,), 0, before=13), lambda args, kwargs: 0),
    "flux_true_cfg": (1, grid((77,), 0, before=13), digest_of("encoder_hidden_states")),
    "sd3": (2, grid((7, 11), 1, after=13), lambda args, kwargs: 0),
    "pixart": (2, grid((7, 11), 1), lambda args, kwargs: 0),
    "hunyuandit": (2, grid((7, 11), 1), lambda args, kwargs: 0),
    "wan": (1, grid((5, 5, 7), 0), digest_of("encoder_hidden_states")),
    "qwenimage": (1, grid((77,), 0, before=13), digest_of("encoder_hidden_states")),
}


def generate(name: str, plan: Plan | None, steps: int, **more: Any) -> tuple[torch.Tensor, Any]:
    case = PIPELINES[name]
    pipe = case.build()
    if plan is not None:
        xdit_compile.parallelize(pipe, plan)
    found = case.call(pipe, steps=steps, **more)
    return found, vars(pipe.transformer).get("forward")


def by_reference(name: str, cuts: Any, steps: int, warmup: int) -> torch.Tensor:
    case = PIPELINES[name]
    scale, tokens, branch = CASES[name]
    pipe = case.build()
    held = [positions[::scale] // scale for positions in cuts.positions]
    pipe.transformer.forward = Reference(
        pipe.transformer, lambda count: tokens(held, count), (cuts.positions, -cuts.back), warmup, branch
    )
    return case.call(pipe, steps=steps)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_staleness_is_the_published_one(name):
    found, runner = generate(name, Plan(patches=3, backend="eager"), 5)
    ((flow,),) = runner.prepared.values()
    expected = by_reference(name, flow.results[0], 5, 1)
    exact, _ = generate(name, None, 5)
    assert difference(found, expected) < 2e-5 < 1e-3 < difference(found, exact)


def rank(index: int, name: str, plan: Plan, steps: int, more: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
    found, runner = generate(name, plan, steps, **more)
    return found, runner.weights.elements, runner.collected


@pytest.mark.parametrize(
    ("name", "stages", "patches"),
    [
        ("flux_true_cfg", 2, 3),
        pytest.param("sd3", 2, 5, marks=pytest.mark.slow),
        pytest.param("hunyuandit", 3, 2, marks=pytest.mark.slow),
        pytest.param("wan", 2, 2, marks=pytest.mark.slow),
        pytest.param("flux", 3, 4, marks=pytest.mark.slow),
    ],
)
def test_stages_compute_what_one_process_does(name, stages, patches):
    """Both with stale values and, where the warm-up is the whole run, without."""
    alone, runner = generate(name, Plan(patches=patches, backend="eager"), 4)
    plan = Plan(pipefusion=stages, patches=patches, backend="eager")
    found = procs.run(rank, stages, name, plan, 4, {})
    total = runner.weights.elements
    for latents, elements, collected in found:
        assert difference(latents, alone) < 2e-5
        assert elements < 0.9 * total
        assert collected == 2, "once to verify, once for the result"


def test_a_warm_up_as_long_as_the_run_is_exact():
    expected, _ = generate("sd3", None, 3)
    found, _ = generate("sd3", Plan(patches=3, warmup_steps=3, backend="eager"), 3)
    assert difference(found, expected) < 2e-5


SCHEDULERS = {
    "sd3": ["FlowMatchHeunDiscreteScheduler"],
    "pixart": [
        "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler",
        "PNDMScheduler", "DEISMultistepScheduler", "LMSDiscreteScheduler", "DDPMScheduler", "SASolverScheduler",
    ],
}  # fmt: skip
"""One step after the other, several values of history, fresh noise in every step, two calls a step."""
DRAINS = {"PNDMScheduler": 2, "SASolverScheduler": 12}
"""How often a scheduler adds patches in place to a tensor that is in none, which takes all of them."""


@pytest.mark.parametrize(("name", "scheduler"), [(name, each) for name, all_ in SCHEDULERS.items() for each in all_])
def test_schedulers_run_patch_by_patch(name, scheduler):
    """Hardly a scheduler needs all patches between the first step and the last, and none makes another picture."""
    import diffusers

    def change(pipe: Any) -> None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)

    case, (scale, tokens, branch) = PIPELINES[name], CASES[name]
    pipe = case.build()
    change(pipe)
    xdit_compile.parallelize(pipe, Plan(patches=3, backend="eager"))
    found = case.call(pipe, steps=5)
    runner = vars(pipe.transformer)["forward"]
    assert runner.collected == 2 + DRAINS.get(scheduler, 0), "once to verify, once for the result"
    ((flow,),) = runner.prepared.values()
    cuts = flow.results[0]
    held = [positions[::scale] // scale for positions in cuts.positions]
    plain = case.build()
    change(plain)
    plain.transformer.forward = Reference(
        plain.transformer, lambda count: tokens(held, count), (cuts.positions, -cuts.back), 1, branch
    )
    assert difference(found, case.call(plain, steps=5)) < 1e-4
