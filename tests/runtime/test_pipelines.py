"""Whole pipelines, unmodified, in two processes: the same pictures, whatever the loop and the scheduler."""

from __future__ import annotations

import procs
import pytest
import torch
from zoo import pipelines as zoo_pipelines

import xdit_compile
from xdit_compile import Plan

QUICK = ["pixart", "wan", "sd3_controlnet"]


def run_pipeline(rank: int, name: str, plan: Plan) -> float:
    case = zoo_pipelines.PIPELINES[name]
    expected = case.call(case.build(), steps=2)
    pipe = case.build()
    cls = type(pipe)
    assert xdit_compile.parallelize(pipe, plan) is pipe
    assert isinstance(pipe, cls) and type(pipe).__name__ == cls.__name__
    found = case.call(pipe, steps=2)
    xdit_compile.restore(pipe)
    assert type(pipe) is cls
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", QUICK)
def test_pipeline_in_two_processes(name: str) -> None:
    assert max(procs.run(run_pipeline, 2, name, Plan(ulysses=2, backend="eager"))) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(zoo_pipelines.PIPELINES))
def test_every_pipeline_in_two_processes(name: str) -> None:
    assert max(procs.run(run_pipeline, 2, name, Plan(ring=2, backend="eager"))) <= 1e-4


def draw_without_generator(rank: int) -> float:
    torch.manual_seed(rank)
    pipe = zoo_pipelines.PIPELINES["dit"].build()
    xdit_compile.parallelize(pipe, Plan(ulysses=2, backend="eager"))
    image = pipe(class_labels=[3], num_inference_steps=1, output_type="np").images
    return float(image.sum())


def test_ranks_draw_the_same_latents_without_a_generator() -> None:
    first, second = procs.run(draw_without_generator, 2)
    assert first == second
