"""Stale methods in pipelines that are not one loop over one denoiser from noise: from a picture, with two denoisers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import procs
import pytest
import torch
from stale_reference import Reference, difference, digest_of
from torch import nn
from zoo.pipelines import PIPELINES, PipelineCase
from zoo.transformers import MODELS

import xdit_compile
from xdit_compile import Plan

Denoisers = Callable[[nn.Module], Any]


def from_a_picture() -> Any:
    return diffusers.StableDiffusion3Img2ImgPipeline(**PIPELINES["sd3"].build().components)


def of_two_denoisers() -> Any:
    """One for noisy steps and one for the others."""
    second = MODELS["wan_t2v"].build()
    for weight in second.parameters():
        weight.data.mul_(0.9)
    given = {**PIPELINES["wan"].build().components, "transformer_2": second, "boundary_ratio": 0.6}
    return diffusers.WanPipeline(**given)


def _picture(d: Any) -> dict[str, Any]:
    return {**PIPELINES["sd3"].arguments(d), "image": d.normal(1, 3, 112, 176).sigmoid(), "strength": 0.6}


CASES = {
    "sd3": PipelineCase("from a picture", from_a_picture, _picture),
    "wan": dataclasses.replace(PIPELINES["wan"], make=of_two_denoisers),
}


def generate(rank: int, name: str, plan: Plan | None, denoisers: Denoisers | None = None) -> torch.Tensor:
    pipe = CASES[name].build()
    if plan is not None:
        xdit_compile.parallelize(pipe, plan)
    for module in (pipe.transformer, getattr(pipe, "transformer_2", None)) if denoisers else ():
        if module is not None:
            module.forward = denoisers(module)
    return CASES[name].call(pipe, steps=8)


def reference(name: str, plan: Plan) -> Denoisers:
    """The plain definition on one process: tokens of each patch, and the part of the result that it makes."""
    parts, apart = max(plan.patch_count, plan.distrifusion), plan.distrifusion > 1
    tokens, sizes, text = (77, (7, 11), 13) if name == "sd3" else (175, (5, 5, 7), 0)
    if apart:
        owner = torch.cat([torch.full((len(part),), at) for at, part in
                           enumerate(torch.tensor_split(torch.arange(tokens), parts))]).reshape(sizes)  # fmt: skip
    else:
        dim = 1 if name == "sd3" else 0
        cut = torch.cat([torch.full((len(part),), at) for at, part in
                         enumerate(torch.tensor_split(torch.arange(sizes[dim]), parts))])  # fmt: skip
        owner = cut.reshape(*(-1 if at == dim else 1 for at in range(len(sizes)))).expand(sizes)
    words = torch.tensor_split(torch.arange(text), parts) if apart else [torch.arange(text), *[torch.arange(0)] * parts]
    held = [torch.cat([(owner.flatten() == at).nonzero()[:, 0], words[at] + tokens]) for at in range(parts)]
    pixels = owner.repeat_interleave(2, -1).repeat_interleave(2, -2)
    masks = [pixels == at for at in range(parts)]
    return lambda module: Reference(
        module,
        lambda count: held if count == tokens + text else None,
        masks,
        1,
        digest_of("encoder_hidden_states"),
        apart=apart,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan", [Plan(pipefusion=2, patches=3, backend="eager"), Plan(distrifusion=2, backend="eager")]
)
@pytest.mark.parametrize("name", CASES)
def test_the_staleness_is_the_published_one(name, plan):
    plan = dataclasses.replace(plan, backend="eager")
    exact, expected = generate(0, name, None), generate(0, name, None, reference(name, plan))
    for found in procs.run(generate, plan.world_size, name, plan):
        assert difference(found, expected) < 2e-5 < 1e-3 < difference(found, exact)
