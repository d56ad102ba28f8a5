"""Batches that no axis of the graph names: which inputs go by sample is tried and tested, and what mixes is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import procs
import pytest
import torch
from conformance.cases import CASES
from conformance.parts import like, picture, prompts
from torch import Tensor, nn
from zoo.more import MORE
from zoo.transformers import Draw

import xdit_compile
from xdit_compile import Plan
from xdit_compile.errors import XditCompileError
from xdit_compile.runtime.cfg_branches import Call, alone
from xdit_compile.runtime.diffusers_pipeline import denoisers, session_of
from xdit_compile.runtime.verify.independence import Bound, Independent, independent


class Of(nn.Module):
    """A module that computes a function."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        nn.init.normal_(self.linear.weight)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.linear, *args, **kwargs)


def tried(function: Callable[..., Any], *args: Any, counts: tuple[int, ...] = (2,), **kwargs: Any) -> Any:
    torch.manual_seed(0)
    module = Of(function)
    return independent(module, module.forward, args, kwargs, [2], counts)


def listed(linear: nn.Module, x: list[Tensor], t: Tensor) -> list[Tensor]:
    return [linear(one) * time for one, time in zip(x, t, strict=True)]


def sized(linear: nn.Module, x: Tensor, size: Tensor) -> Tensor:
    return linear(x) * size[0] + size[1]


def centred(linear: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return linear(x - x.mean(0)) * t[:, None, None]


def to_the_longest(linear: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return (linear(x) * mask[:, :, None])[:, : int(mask.sum(1).max())].mean(1)


def with_capacity(linear: nn.Module, x: Tensor) -> Tensor:
    """Each of two experts takes the first three quarters of as many tokens as there are: none is full as it stands."""
    tokens = x.reshape(-1, 5)
    expert = (tokens[:, 0] > 0).long()
    place = nn.functional.one_hot(expert, 2).cumsum(0).gather(1, expert[:, None])[:, 0]
    return torch.where((place <= len(tokens) * 3 // 4)[:, None], linear(tokens), tokens).reshape(x.shape)


def in_thirds(linear: nn.Module, x: Tensor) -> Tensor:
    first, second, third = x.chunk(3)
    return torch.cat([linear(first), linear(second), third])


def mixed(linear: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """No axis is the batch of what is stacked."""
    mean = x.mean(0)
    return torch.stack([linear(one - mean) * time for one, time in zip(x, t, strict=True)])


X = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
T = torch.tensor([701, 701])


def test_what_goes_by_sample_is_found() -> None:
    lists = tried(listed, [torch.randn(3, 5), torch.randn(7, 5)], T)
    assert isinstance(lists, Independent) and lists.cut.entries == {(0, 0), (0, 1)}
    assert lists.pieces == [((0, 0),), ((1, 0),)]
    by_size = tried(sized, X, size=torch.tensor([2, 2]))
    assert isinstance(by_size, Independent) and by_size.cut.entries == {(0, 0)}
    three = independent(module := Of(lambda linear, x: linear(x)), module.forward, (torch.randn(3, 5),), {}, [2], [3])
    assert isinstance(three, Independent) and [three.cut.span(at) for at in range(2)] == [(0, 2), (2, 3)]


@pytest.mark.parametrize(
    ("function", "args", "named"),
    [
        (centred, (X, T), "input argument 0"),
        (to_the_longest, (X, torch.ones(2, 4, dtype=torch.bool)), "input argument 1"),
        (with_capacity, (X,), "input argument 0"),
        (in_thirds, (torch.randn(3, 4, 5),), "fewer samples at once"),
    ],
)
def test_what_mixes_samples_is_refused(function: Callable[..., Any], args: tuple, named: str) -> None:
    found = tried(function, *args, counts=(len(args[0]),))
    assert isinstance(found, Bound) and named in found.why


def test_reasons_of_calls_alone_are_told_apart() -> None:
    def call(time: int, why: Bound) -> Call:
        return Call(None, "transformer", [X, torch.tensor(time), None], why)

    one = Bound("is called with 1 sample at once", 1)
    assert "guidance-distilled" in str(alone(2, call(3, one), call(4, one)))
    assert "reads the result of transformer for one branch" in str(alone(2, call(3, one), call(3, one)))
    assert "cfg=4 but transformer is called with 2" in str(alone(4, call(3, Bound("is called with 2 …", 2))))


SIZE = {"height": 112, "width": 176}


def guess_mode() -> tuple[Any, dict[str, Any]]:
    """A control net that is called for one branch of the two that the U-Net has."""
    pipe = like("sd15", diffusers.StableDiffusionControlNetPipeline, controlnet=MORE["unet_controlnet"].build())
    pipe.set_progress_bar_config(disable=True)
    d = Draw(0)
    return pipe, {**prompts(d), **SIZE, "image": picture(d, SIZE), "guess_mode": True, "guidance_scale": 5.0}


def guessed(pipe: Any, given: dict[str, Any]) -> Tensor:
    given = {**given, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    return pipe(num_inference_steps=2, **given)[0]


def difference(found: Any, expected: Any) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def run_guidance(rank: int) -> tuple[list[float], list[tuple[int, int]], list[str]]:
    """Pipelines whose stacked branches the graph takes apart, and modules whose batch cannot be shared."""
    found, counted, refused = [], [], []
    for plan, images in ((Plan(cfg=2, backend="eager"), 1), (Plan(data=2, backend="eager"), 3)):
        unsplit, pipe = (CASES["zimage"].build() for _ in range(2))
        xdit_compile.parallelize(pipe, plan)
        made = [CASES["zimage"].call(each, 0, images, output_type="latent")[0] for each in (pipe, unsplit)]
        found.append(difference(*made))
        branches = session_of(next(module for _, module in denoisers(pipe))).branches
        counted.append((branches.shared, branches.alone))
    pipe, given = guess_mode()
    expected = guessed(pipe, given)
    found.append(difference(guessed(xdit_compile.parallelize(pipe, Plan(cfg=2, backend="eager")), given), expected))
    for plan in (
        Plan(cfg=2, backend="eager"),
        Plan(data=2, backend="eager"),
        Plan(data=2, verify=False, backend="eager"),
    ):
        module = xdit_compile.parallelize(Of(mixed).eval(), plan)
        with pytest.raises(XditCompileError) as caught:
            for time in (3, 2):
                module(X, T * time).sum().item()
        refused.append(str(caught.value))
    return found, counted, refused


@pytest.mark.slow
def test_guidance_of_calls_that_the_graph_takes_apart() -> None:
    for found, counted, refused in procs.run(run_guidance, 2, timeout=400):
        assert max(found) <= 2e-5
        assert counted == [(2, 0), (0, 0)]
        assert "cfg=2 but module mixes its samples: one's result changes with another's input argument 0" in refused[0]
        assert "data=2 but module mixes its samples" in refused[1]
        assert "data=2 but module may be cut after a trial alone, which verify=False forbids" in refused[2]
