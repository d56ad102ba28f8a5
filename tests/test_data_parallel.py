"""Data parallel: ranks share the batch of every call, and everyone has the same pictures as one process makes."""

from __future__ import annotations

import inspect
from typing import Any

import procs
import pytest
import torch
import zoo_pipelines
from zoo import Draw

import xdit_compile
from xdit_compile import Plan
from xdit_compile.errors import UsageError


def generators(images: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(images)]


REPEATED = ("cogvideox", "hunyuandit", "ltx", "sd3")
"""Pipelines that themselves make one image of given embeddings, whatever number is asked for."""


def several(case: zoo_pipelines.PipelineCase, pipe: Any, images: int) -> dict[str, Any]:
    """What makes a pipeline's call one for several images."""
    if case.name in REPEATED:
        given = case.arguments(Draw(0))
        return {name: value.repeat_interleave(images, 0) for name, value in given.items() if "prompt" in name}
    taken = inspect.signature(type(pipe).__call__).parameters
    count = "num_images_per_prompt" if "num_images_per_prompt" in taken else "num_videos_per_prompt"
    return {count: images} if count in taken else {"class_labels": [3, 5, 1, 2, 4][:images]}


def run_pipeline(rank: int, name: str, plan: Plan, numbers: tuple[int, ...], output: str) -> list[float]:
    """How far requests for so many images lie from the unsplit ones, with a generator for each image, one, and none."""
    case, found = zoo_pipelines.PIPELINES[name], []
    unsplit = case.build()
    pipe = xdit_compile.parallelize(case.build(), plan)
    for images in numbers:
        for drawn_from in (lambda n: {"generator": generators(n)}, lambda n: {}, lambda n: {"generator": None}):
            pictures = [
                case.call(each, output=output, **{**several(case, each, images), **drawn_from(images)})
                for each in (pipe, unsplit)
            ]
            found.append(((pictures[0] - pictures[1]).abs().max() / pictures[1].abs().max()).item())
            assert pictures[0].shape == pictures[1].shape and pictures[0].shape[0] == images
    return found


def check(name: str, plan: Plan, *numbers: int, output: str = "latent") -> None:
    for differences in procs.run(run_pipeline, plan.world_size, name, plan, numbers, output, timeout=400):
        assert max(differences) <= 2e-5


def test_two_ranks_share_images_whatever_they_are_drawn_from() -> None:
    check("pixart", Plan(data=2, backend="eager"), 2, 3, 5)


def test_a_pipeline_that_draws_from_the_default_generator_and_the_autoencoder() -> None:
    check("sd3_controlnet", Plan(data=2, vae="patch", backend="eager"), 1, output="np")


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [Plan(data=2, cfg=2), Plan(data=2, ulysses=2), Plan(data=2, tensor=2), Plan(data=2, pipefusion=2, warmup_steps=2)],
    ids=str,
)
def test_with_other_degrees(plan: Plan) -> None:
    check("pixart", plan, 2, 3)
    check("flux", plan, 4) if plan.cfg == 1 else check("wan", plan, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo_pipelines.PIPELINES) - {"pixart", "sd3_controlnet"}))
def test_every_pipeline(name: str) -> None:
    check(name, Plan(data=2, backend="eager"), 3)


def one_image(rank: int) -> str:
    pipe = xdit_compile.parallelize(zoo_pipelines.PIPELINES["flux"].build(), Plan(data=2, backend="eager"))
    with pytest.raises(UsageError) as caught:
        zoo_pipelines.PIPELINES["flux"].call(pipe)
    zoo_pipelines.PIPELINES["flux"].call(pipe, num_images_per_prompt=2)
    return str(caught.value)


def test_fewer_images_than_ranks_are_refused() -> None:
    for message in procs.run(one_image, 2):
        assert "data=2 but transformer is called with fewer images at once" in message
