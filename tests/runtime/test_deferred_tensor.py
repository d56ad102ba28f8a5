"""Deferred tensors: what is recorded, what asks for the values, and that neither changes a result."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xdit_compile.runtime.tensors.deferred_tensor import Deferred, Source, values_of

VALUES = torch.arange(12.0).reshape(3, 4) - 5


class Made:
    """A deferred tensor of `VALUES` that counts how often it was asked for them."""

    def __init__(self) -> None:
        self.asked = 0
        self.source = Source(self._make)
        (self.tensor,) = self.source.deferred([torch.empty(3, 4)])

    def _make(self) -> None:
        self.asked += 1
        self.source.fill([VALUES.clone()])


RECORDED: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, 1:3],
    "cast": lambda x: x.to(torch.float64),
    "half": lambda x: x.half(),
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "split": lambda x: x.split([1, 2])[1],
    "unbind": lambda x: x.unbind(0)[2],
    "arithmetic": lambda x: (x * 2 + torch.ones(4)) / 3 - x.neg(),
    "view": lambda x: x.view(2, 6).unsqueeze(0).permute(2, 0, 1),
    "reshape": lambda x: x.t().reshape(-1),
    "cat": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "stack": lambda x: torch.stack([x, x]),
    "clamp": lambda x: x.clamp(-1, 1),
}


@pytest.mark.parametrize("name", RECORDED)
def test_views_and_pointwise_operators_wait(name: str) -> None:
    made = Made()
    found, expected = RECORDED[name](made.tensor), RECORDED[name](VALUES)
    assert isinstance(found, Deferred) and made.asked == 0
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(found.value(), expected)
    assert made.asked == 1


READ: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item(),
    "sum": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy().tolist(),
    "norm": lambda x: x.norm().item(),
    "matmul": lambda x: (x @ x.t()).tolist(),
    "compare": lambda x: bool((x > 0).any()),
    "copy": lambda x: copy.deepcopy(x).tolist(),
    "written into another": lambda x: torch.zeros(3, 4).copy_(x).tolist(),
    "text": lambda x: str(x),
}


@pytest.mark.parametrize("name", READ)
def test_reading_asks_for_the_values_once(name: str) -> None:
    made = Made()
    assert READ[name](made.tensor) == READ[name](VALUES)
    assert made.asked == 1


def test_what_is_recorded_sees_the_past() -> None:
    made, scale = Made(), torch.tensor(2.0)
    scaled, view = made.tensor * scale, made.tensor[0]
    scale.mul_(100)
    made.tensor.add_(1)
    assert torch.equal(values_of(scaled), VALUES * 2)
    assert torch.equal(values_of(view), VALUES[0] + 1)
    assert torch.equal(values_of(made.tensor), VALUES + 1)


def test_results_of_two_sources_need_both() -> None:
    first, second = Made(), Made()
    total = first.tensor + second.tensor
    assert (first.asked, second.asked) == (1, 1)
    assert torch.equal(total, 2 * VALUES)


def test_a_change_of_shape_in_place_is_refused() -> None:
    with pytest.raises(RuntimeError, match="in place"):
        Made().tensor.unsqueeze_(0)
