"""Data parallel: images shared out over replicas, and the same pictures in the same order as one process makes."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import procs
import pytest
import torch
import zoo_pipelines
from diffusers.utils import BaseOutput
from PIL import Image
from zoo import Draw

import xdit_compile
from xdit_compile import Plan
from xdit_compile.agreement import Agreement
from xdit_compile.errors import UsageError
from xdit_compile.mesh import Mesh
from xdit_compile.replicas import Images, Replicas, count_images, join, sent
from xdit_compile.results import found_in


def replica(count: int, index: int) -> Replicas:
    return Replicas(Mesh.simulated(Plan(data=count), index), Agreement("one", index, [index], [index], 1.0))


def call(prompt: Any = None, negative_prompt: Any = None, num_images_per_prompt: int = 1, **kwargs: Any) -> None:
    """A pipeline's signature."""


def shared(count: int, *args: Any, **given: Any) -> list[dict[str, Any]]:
    return [replica(count, index).arguments(call, args, given)[1] for index in range(count)]


def test_images_are_counted_from_prompts_embeddings_or_labels() -> None:
    assert count_images({"prompt": "a"}) == Images(1, 1)
    assert count_images({"prompt": ["a", "b"], "num_images_per_prompt": 3}) == Images(2, 3)
    assert count_images({"prompt_embeds": torch.zeros(5, 2, 2), "num_videos_per_prompt": 2}) == Images(5, 2)
    assert count_images({"class_labels": [1, 2, 3]}).total == 3


def test_every_image_becomes_an_entry_of_its_own() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    first, second = shared(2, ["a", "b"], num_images_per_prompt=2, negative_prompt="no", generator=generators, steps=9)
    assert (first["prompt"], second["prompt"]) == (["a", "a"], ["b", "b"])
    assert first["negative_prompt"] == ["no", "no"]
    assert (first["generator"], second["generator"]) == (generators[:2], generators[2:])
    assert first["num_images_per_prompt"] == second["num_images_per_prompt"] == 1
    assert first["steps"] == 9


def test_shares_need_not_be_even_and_tensors_are_cut_along_their_images() -> None:
    latents, embeds = torch.arange(5.0).reshape(5, 1), torch.arange(10.0).reshape(5, 2)
    parts = shared(3, prompt_embeds=embeds, latents=latents, sigmas=[0.1] * 5)
    assert [len(part["latents"]) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part["prompt_embeds"] for part in parts]), embeds)
    assert all(part["sigmas"] == [0.1] * 5 for part in parts)


def test_one_prompt_and_several_images_each_repeat_its_embedding() -> None:
    embeds = torch.ones(1, 2)
    parts = shared(2, prompt_embeds=embeds, num_images_per_prompt=3)
    assert [part["prompt_embeds"].shape[0] for part in parts] == [2, 1]


def test_a_single_generator_gives_each_replica_another_stream() -> None:
    def draw(index: int) -> float:
        given = {"prompt": ["a", "b"], "generator": torch.Generator().manual_seed(3)}
        return torch.rand(1, generator=replica(2, index).arguments(call, (), given)[1]["generator"]).item()

    plain = torch.rand(1, generator=torch.Generator().manual_seed(3)).item()
    assert draw(0) == plain
    assert draw(1) == draw(1) != plain


def test_more_replicas_than_images_are_refused() -> None:
    with pytest.raises(UsageError, match="data=2 replicas but 1 image: give more prompts"):
        shared(2, "a")


@dataclasses.dataclass
class Pictures(BaseOutput):
    """Of the fields the second has no default and is often None."""

    images: Any
    flagged: list[bool] | None
    rate: int = 8


COLORS = ("red", "green", "blue")
MAKES: dict[str, Callable[[list[Any], torch.Tensor], Any]] = {
    "a field that is None": lambda images, _: Pictures(images, None),
    "flags": lambda images, _: Pictures(images, [image.getpixel((0, 0))[0] > 0 for image in images]),
    "tensors": lambda _, tensor: Pictures(tensor, None),
    "arrays": lambda _, tensor: Pictures(tensor.numpy(), None),
    "videos": lambda images, _: Pictures([[image, image] for image in images], None),
    "tuple": lambda images, tensor: (images, tensor, None, torch.tensor(8)),
    "within one another": lambda images, tensor: {"one": Pictures(images, None), "two": (tensor,), "rate": 8},
    "a list alone": lambda images, _: images,
}


def made(kind: str, start: int, stop: int) -> Any:
    images = [Image.new("RGB", (2, 2), color) for color in COLORS[start:stop]]
    return MAKES[kind](images, torch.arange(6.0).reshape(3, 2)[start:stop])


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    leaves = (torch.Tensor, np.ndarray, Image.Image, int, type(None))
    for one, other in zip(found_in(found, leaves), found_in(expected, leaves), strict=True):
        assert type(one) is type(other)
        assert (np.array(one) == np.array(other)).all()


@pytest.mark.parametrize("kind", MAKES)
def test_results_are_joined_in_the_object_that_was_made(kind: str) -> None:
    first, second = made(kind, 0, 2), made(kind, 2, 3)
    found = join(first, pickle.loads(pickle.dumps([sent(first), sent(second)])))
    assert found is first or isinstance(first, tuple | list)
    assert_same(found, made(kind, 0, 3))
    if isinstance(found, Pictures):
        assert found["images"] is found.images


def test_replicas_with_other_fields_are_told_of() -> None:
    first, second = Pictures([1], [True]), Pictures([2], None)
    with pytest.raises(UsageError, match="other fields"):
        join(first, [sent(first), sent(second)])


def run_pipeline(rank: int, name: str, plan: Plan, images: int) -> tuple[list[int], float]:
    case = zoo_pipelines.PIPELINES[name]

    def generate(pipe: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
        return case.call(pipe, generator=generators, **several(case, pipe, images))

    expected = generate(case.build())
    found = generate(xdit_compile.parallelize(case.build(), plan))
    if found.shape != expected.shape:
        return list(found.shape), 0.0
    return list(found.shape), ((found - expected).abs().max() / expected.abs().max()).item()


REPEATED = ("cogvideox", "hunyuandit", "ltx", "sd3")
"""Pipelines that themselves make one image of given embeddings, whatever number is asked for."""


def several(case: zoo_pipelines.PipelineCase, pipe: Any, images: int) -> dict[str, Any]:
    """What makes a pipeline's call one for several images."""
    if case.name in REPEATED:
        given = case.arguments(Draw(0))
        return {name: value.repeat_interleave(images, 0) for name, value in given.items() if "prompt" in name}
    taken = inspect.signature(type(pipe).__call__).parameters
    count = "num_images_per_prompt" if "num_images_per_prompt" in taken else "num_videos_per_prompt"
    return {count: images} if count in taken else {"class_labels": [3, 5, 1][:images]}


@pytest.mark.parametrize(
    ("name", "plan", "images"),
    [
        ("pixart", Plan(data=2, backend="eager"), 3),
        ("flux", Plan(data=2, backend="eager"), 2),
        pytest.param("pixart", Plan(data=2, cfg=2, backend="eager"), 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_pipeline_over_replicas(name: str, plan: Plan, images: int) -> None:
    check(name, plan, images)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo_pipelines.PIPELINES) - {"pixart", "flux", "sd3_controlnet"}))
def test_every_pipeline_over_replicas(name: str) -> None:
    check(name, Plan(data=2, backend="eager"), 3)


def check(name: str, plan: Plan, images: int) -> None:
    results = procs.run(run_pipeline, plan.world_size, name, plan, images)
    whole = plan.world_size // plan.data
    for rank, (shape, difference) in enumerate(results):
        assert difference <= 1e-4
        assert (shape[0] == images) == (rank < whole)
