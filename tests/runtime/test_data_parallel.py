"""Data parallel: ranks share the batch of every call, and everyone has the same pictures as one process makes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import diffusers
import procs
import pytest
import torch
from conformance.case import Case
from conformance.cases import CASES
from conformance.parts import like, photo, picture, prompts
from zoo import pipelines as zoo_pipelines
from zoo.more import MORE
from zoo.transformers import Draw

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


SIZE = {"height": 112, "width": 176}


def _two_references(d: Draw, request: int) -> dict[str, Any]:
    return {**CASES["flux2"].arguments(d, request), "image": [photo(d, SIZE), photo(d, SIZE)]}


def _two_nets() -> Any:
    nets = [MORE["unet_controlnet"].build() for _ in range(2)]
    return like("sd15", diffusers.StableDiffusionControlNetPipeline, controlnet=nets)


def _two_controls(d: Draw, request: int) -> dict[str, Any]:
    return {**prompts(d), **SIZE, "image": [picture(d, SIZE), picture(d, SIZE)], "guidance_scale": 5.0}


def _three_prompts(d: Draw, request: int) -> dict[str, Any]:
    return {**CASES["sd3_prompted"].arguments(d, request), "prompt": ["a red star", "a blue moon", "mint"]}


LENGTHS = {
    "two references": (dataclasses.replace(CASES["flux2"], arguments=_two_references), 2),
    "two control nets": (Case("two_nets", _two_nets, _two_controls), 2),
    "a prompt each": (
        dataclasses.replace(CASES["sd3_prompted"], arguments=_three_prompts, pair=lambda given: given),
        3,
    ),
    "a video's frames": (CASES["svd"], 2),
    "lists of samples": (CASES["zimage"], 3),
    "one loop over samples": (CASES["mochi"], 2),
}


def run_lengths(rank: int) -> dict[str, float]:
    found = {}
    for name, (case, images) in LENGTHS.items():
        unsplit, pipe = case.build(), xdit_compile.parallelize(case.build(), Plan(data=2, backend="eager"))
        one, other = (case.call(each, 0, images, output_type="latent")[0] for each in (pipe, unsplit))
        found[name] = ((one - other).abs().max() / other.abs().max()).item()
        assert one.shape == other.shape and len(one) == images
    return found


@pytest.mark.slow
def test_inputs_as_long_as_there_are_images() -> None:
    for differences in procs.run(run_lengths, 2, timeout=500):
        assert max(differences.values()) <= 2e-5, differences


def one_image(rank: int) -> str:
    pipe = xdit_compile.parallelize(zoo_pipelines.PIPELINES["flux"].build(), Plan(data=2, backend="eager"))
    with pytest.raises(UsageError) as caught:
        zoo_pipelines.PIPELINES["flux"].call(pipe)
    zoo_pipelines.PIPELINES["flux"].call(pipe, num_images_per_prompt=2)
    return str(caught.value)


def test_fewer_images_than_ranks_are_refused() -> None:
    for message in procs.run(one_image, 2):
        assert "data=2 but transformer is called with fewer images at once" in message
