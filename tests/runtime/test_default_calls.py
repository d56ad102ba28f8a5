"""Pipelines called as users call them, ``return_dict`` and ``output_type`` untouched; a field of the output is None."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import procs
import pytest
import torch
from PIL import Image
from zoo import unets as zoo_unets
from zoo.pipelines import PIPELINES, _vae
from zoo.transformers import Draw, randomise

import xdit_compile
from xdit_compile import Plan

NONE = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
V = "v_prediction"


def _unet(**config: Any) -> Any:
    model = zoo_unets._unet(**config)
    randomise(model, 3)
    return model.eval().requires_grad_(False)


def _lcm() -> Any:
    return diffusers.LatentConsistencyModelPipeline(
        vae=_vae(4), unet=_unet(time_cond_proj_dim=8), scheduler=diffusers.LCMScheduler(prediction_type=V),
        requires_safety_checker=False, **NONE,
    )  # fmt: skip


def _pix2pix() -> Any:
    return diffusers.StableDiffusionInstructPix2PixPipeline(
        vae=_vae(4), unet=_unet(in_channels=8), requires_safety_checker=False,
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type=V, steps_offset=1), **NONE,
    )  # fmt: skip


def _deepfloyd() -> Any:
    return diffusers.IFPipeline(
        unet=_unet(in_channels=3, out_channels=6), requires_safety_checker=False, watermarker=None,
        scheduler=diffusers.DDPMScheduler(prediction_type=V, variance_type="learned_range"), **NONE,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
    """A pipeline and what its call is given, and which field of its output is None."""

    make: Callable[[], Any]
    given: Callable[[Draw], dict[str, Any]]
    none: str = "nsfw_content_detected"

    def call(self, pipe: Any, **more: Any) -> Any:
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            **{**self.given(Draw(0)), "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), **more}
        )


def _prompts(d: Draw, negative: bool = True, **more: Any) -> dict[str, Any]:
    names = ("prompt_embeds", "negative_prompt_embeds")[: 1 + negative]
    return {**{name: d.normal(1, 13, 28) for name in names}, **more}


REQUESTS = {
    "stable diffusion": Request(PIPELINES["sd15"].make, PIPELINES["sd15"].arguments),
    "hunyuandit": Request(PIPELINES["hunyuandit"].make, PIPELINES["hunyuandit"].arguments),
    "lcm": Request(_lcm, partial(_prompts, negative=False, height=112, width=176)),
    "pix2pix": Request(_pix2pix, partial(_prompts, image=Image.new("RGB", (112, 80), "orange"))),
    "deepfloyd": Request(_deepfloyd, partial(_prompts, height=24, width=32), "watermark_detected"),
}


def assert_alike(found: Any, expected: Any, none: str) -> None:
    assert type(found) is type(expected) and vars(found).keys() == vars(expected).keys()
    assert getattr(found, none) is None and list(found) == list(expected)
    assert found["images"] is found.images is found[0]
    for one, other in zip(found.images, expected.images, strict=True):
        assert type(one) is type(other)
        limit = 1 if isinstance(one, Image.Image) else 1e-4
        assert np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).max() <= limit


@pytest.mark.parametrize("name", REQUESTS)
def test_one_rank(name: str) -> None:
    request = REQUESTS[name]
    pipe = request.make()
    expected = request.call(pipe)
    xdit_compile.parallelize(pipe, Plan(backend="eager", verify=False))
    assert_alike(request.call(pipe), expected, request.none)


def test_a_latent_in_patches_is_made_whole_where_it_stands() -> None:
    request = REQUESTS["hunyuandit"]
    pipe = request.make()
    expected = request.call(pipe, output_type="latent")
    xdit_compile.parallelize(pipe, Plan(patches=2, warmup_steps=1, backend="eager"))
    found = request.call(pipe, output_type="latent")
    assert type(found) is type(expected) and found.nsfw_content_detected is None
    assert type(found.images) is type(found["images"]) is torch.Tensor
    assert found.images.shape == expected.images.shape


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def two_ranks(rank: int) -> None:
    for name, plan in (("stable diffusion", Plan(ring=2, backend="eager")), ("lcm", Plan(data=2, backend="eager"))):
        request, count = REQUESTS[name], plan.data
        pipe = request.make()
        expected = request.call(pipe, num_images_per_prompt=count, generator=seeds(count))
        xdit_compile.parallelize(pipe, plan)
        found = request.call(pipe, num_images_per_prompt=count, generator=seeds(count))
        assert_alike(found, expected, request.none)


def guidance_ends_early(rank: int) -> None:
    """The call of the last step waits alone, and nothing of the pipeline's reads what it gives."""
    case = PIPELINES["wan"]

    def generate() -> Any:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        given = {**case.arguments(Draw(0)), "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        return pipe(**given, num_inference_steps=2, callback_on_step_end=without_guidance)

    def without_guidance(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return {}

    pipe = case.build()
    expected = generate()
    xdit_compile.parallelize(pipe, Plan(cfg=2, backend="eager"))
    found = generate()
    assert type(found) is type(expected) and type(found.frames) is torch.Tensor
    if rank == 0:
        torch.testing.assert_close(found.frames, expected.frames, rtol=1e-4, atol=1e-4)


def both(rank: int) -> None:
    two_ranks(rank)
    guidance_ends_early(rank)


def test_two_ranks() -> None:
    procs.run(both, 2)
