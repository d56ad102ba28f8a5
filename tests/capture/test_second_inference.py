"""Equal sizes are no proof of equal axes: captured again at other, distinct sizes every dim has the axis it had."""

from __future__ import annotations

import pytest
import torch
from resized import Resized, differences, resized
from splitting import CASES, captured
from torch import nn

from xdit_compile.capture.capture import capture
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.rules.registry import rulebook

NUMBERS = {
    "wan_i2v": (512,),
    "wan_animate": (512, 4),
    "qwenimage21": (13,),
    "zimage": (12,),
    "hunyuanimage": (2,),
    "hunyuan_video15": (2,),
}
"""Sizes that code has as numbers, pads to a multiple or counts samples by: another is another meaning there."""
FIXED = {"qwenimage21", "ideogram4"}
"""Models whose arguments say every size once more, as numbers."""
FAST = ("sd3",)


def again(module: nn.Module, args: tuple, kwargs: dict, first: Inference, name: str = "") -> tuple[Resized, Inference]:
    other = resized(module, args, kwargs, first, NUMBERS.get(name, ()))
    return other, infer(capture(module, other.args, other.kwargs), rulebook())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in CASES if name != "hidream"],
)
def test_axes_are_the_same_at_other_sizes(name: str) -> None:
    model = captured(name)
    other, second = again(model.module, model.args, model.kwargs, model.inference, name)
    assert other.changed or name in FIXED, f"no axis of {name} takes another size"
    assert differences(model.inference, second) == []


def test_axes_that_are_one_by_accident_are_found() -> None:
    class Mistaken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y + y.reshape(y.shape[0], y.shape[2], y.shape[1]).mean((1, 2), keepdim=True)

    module, x = Mistaken().eval(), torch.randn(2, 6, 6)
    first = infer(capture(module, (x,), {}), rulebook())
    other, second = again(module, (x,), {}, first)
    assert (6, 10) in other.changed
    assert any("reshape" in each or "view" in each for each in differences(first, second))
