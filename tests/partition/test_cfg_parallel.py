"""Classifier-free guidance over ranks: stacked branches are a split batch, branches called one by one wait together."""

from __future__ import annotations

from typing import Any

import procs
import pytest
import torch
from splitting import captured, run_split
from zoo import pipelines as zoo_pipelines
from zoo import transformers as zoo

import xdit_compile
from xdit_compile import Plan
from xdit_compile.runtime.diffusers_pipeline import denoisers, session_of

PLAN = Plan(cfg=2, backend="eager")
GUIDED = sorted(set(zoo_pipelines.PIPELINES) - {"flux"})
QUICK = ["pixart", "wan"]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def run_pipeline(rank: int, name: str, more: dict[str, Any]) -> tuple[float, int, int]:
    case = zoo_pipelines.PIPELINES[name]
    expected = case.call(case.build(), steps=3, **more)
    pipe = xdit_compile.parallelize(case.build(), PLAN)
    difference = relative(case.call(pipe, steps=3, **more), expected)
    branches = session_of(next(module for _, module in denoisers(pipe))).branches
    return difference, branches.shared, branches.alone


def check(name: str, **more: Any) -> None:
    steps, calls = 3, zoo_pipelines.PIPELINES[name].calls
    for difference, shared, alone in procs.run(run_pipeline, 2, name, more):
        assert difference <= 1e-4
        assert (shared >= steps * calls, alone) == (True, 0)


@pytest.mark.parametrize("name", QUICK)
def test_pipeline_with_its_branches_on_two_processes(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(GUIDED) - {*QUICK, "sd3_controlnet"}))
def test_every_pipeline_with_its_branches_on_two_processes(name: str) -> None:
    check(name)


def test_guidance_rescaled_by_the_branches_deviations() -> None:
    check("sdxl", guidance_rescale=0.7)


def guidance_off(pipe: Any, step: int, timestep: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if step == 0:
        pipe._guidance_scale = 1.0
        return {name: value.chunk(2)[1] if len(value) == 2 else value for name, value in given.items()}
    return given


@pytest.mark.parametrize(
    ("name", "kept"), [("wan", ["latents"]), ("sd3", ["prompt_embeds", "pooled_prompt_embeds", "latents"])]
)
def test_guidance_turned_off_half_way(name: str, kept: list[str]) -> None:
    more = {"callback_on_step_end": guidance_off, "callback_on_step_end_tensor_inputs": kept}
    for difference, shared, alone in procs.run(run_pipeline, 2, name, more):
        assert difference <= 1e-4
        assert (shared, alone) == (zoo_pipelines.PIPELINES[name].calls, 2)


def run_distilled(rank: int) -> str:
    case = zoo_pipelines.PIPELINES["flux"]
    pipe = xdit_compile.parallelize(case.build(), PLAN)
    with pytest.raises(xdit_compile.XditCompileError) as caught:
        case.call(pipe, steps=2)
    return str(caught.value)


def test_a_distilled_model_is_refused_with_the_reason() -> None:
    for message in procs.run(run_distilled, 2):
        assert message.startswith("cfg=2 but this pipeline makes one call") and "use cfg=1" in message


def run_three_branches(rank: int) -> tuple[float, int, int]:
    case = zoo.MODELS["wan_t2v"]
    module = case.build()
    inputs = [case.inputs()[1] for _ in range(3)]
    for at, kwargs in enumerate(inputs):
        kwargs["encoder_hidden_states"] = kwargs["encoder_hidden_states"] + at
    with torch.no_grad():
        expected = [module(**kwargs)[0] for kwargs in inputs]
    xdit_compile.parallelize(module, PLAN)
    found = [module(**kwargs)[0] for kwargs in inputs]
    guided = found[0] + 2 * (found[1] - found[0]) + 3 * (found[2] - found[1])
    reference = expected[0] + 2 * (expected[1] - expected[0]) + 3 * (expected[2] - expected[1])
    branches = session_of(module).branches
    return relative(guided, reference), branches.shared, branches.alone


def test_three_branches_on_two_ranks() -> None:
    for difference, shared, alone in procs.run(run_three_branches, 2):
        assert difference <= 2e-5
        assert (shared, alone) == (2, 1)


@pytest.mark.parametrize("name", ["pixart", "sd3", "cogvideox"])
def test_a_stacked_batch_is_split_beside_tokens(name: str) -> None:
    for plan in (
        Plan(cfg=2),
        Plan(cfg=2, ring=2),
        Plan(cfg=2, ulysses=2, mesh_order=("data", "pipefusion", "distrifusion", "ring", "ulysses", "cfg", "tensor")),
    ):
        worst, ranks = run_split(captured(name), plan)
        assert worst <= 2e-5
        assert ranks[0].ledger.flops_here <= 1.2 * ranks[0].ledger.flops / plan.world_size
        assert not [gather for gather in ranks[0].ledger.gathers if gather.place.repeated]
