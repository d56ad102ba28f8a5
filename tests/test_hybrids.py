"""PipeFusion with every other way to split: the very staleness of the same patches on one process, exact with none."""

from __future__ import annotations

from typing import Any

import procs
import pytest
import torch
from hybrids import Simulated
from splitting import captured, worst_difference
from test_pipefusion import difference, generate
from torch.utils import _pytree as pytree

from xdit_compile import Plan


def label(value: Any) -> str:
    """A plan by what is above 1 in it."""
    names = ("cfg", "pipefusion", "patches", "ring", "ulysses", "tensor")
    if isinstance(value, str):
        return value
    return " ".join(f"{name}{getattr(value, name)}" for name in names if (getattr(value, name) or 1) > 1)


def moved(args: tuple, kwargs: dict) -> Any:
    """Inputs of another step: what has tokens is another, masks and labels stay."""
    return pytree.tree_map_only(
        torch.Tensor,
        lambda x: x + 0.3 * torch.sin(7 * x) if x.is_floating_point() and x.ndim > 2 else x,
        (args, kwargs),
    )


def check(name: str, plan: Plan) -> None:
    """Exact at once and patch by patch on what that left; in the next step as stale as on one process."""
    model = captured(name)
    alone, ranks = (Simulated(model, each) for each in (Plan(patches=plan.patch_count), plan))
    for found in (ranks.all_tokens(model.args, model.kwargs), ranks.in_patches(model.args, model.kwargs)):
        assert max(worst_difference(each, model.expected) for each in found) < 2e-5
    alone.all_tokens(model.args, model.kwargs)
    args, kwargs = moved(model.args, model.kwargs)
    (expected,) = alone.in_patches(args, kwargs)
    assert worst_difference(model.expected, expected) > 1e-3
    assert max(worst_difference(each, expected) for each in ranks.in_patches(args, kwargs)) < 2e-5


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_heads_and_channels_of_every_patch_are_shared(name):
    check(name, Plan(patches=3, tensor=2))


def hybrid(rank: int, name: str, plan: Plan, steps: int) -> tuple[torch.Tensor, int, int]:
    found, runner = generate(name, plan, steps)
    return found, runner.weights.elements, runner.collected


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param("sd3", Plan(pipefusion=2, patches=3, tensor=2), marks=pytest.mark.slow),
        pytest.param("flux", Plan(pipefusion=2, patches=3, tensor=2), marks=pytest.mark.slow),
        pytest.param("pixart", Plan(patches=3, tensor=3), marks=pytest.mark.slow),
    ],
    ids=label,
)
def test_processes_compute_what_one_does(name, plan):
    """Both with stale values and, where the warm-up is the whole run, without."""
    plan = Plan(**{**vars(plan), "backend": "eager"})
    alone, runner = generate(name, Plan(patches=plan.patches, backend="eager"), 4)
    for latents, elements, collected in procs.run(hybrid, plan.world_size, name, plan, 4):
        assert difference(latents, alone) < 2e-5
        assert plan.pipefusion * plan.tensor == 1 or elements < runner.weights.elements
        assert collected == 2, "once to verify, once for the result"
