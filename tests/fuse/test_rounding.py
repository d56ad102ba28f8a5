"""Passes for GPUs round no more than the graph does without them; their operators run on the CPU here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xdit_compile.capture.capture import capture
from xdit_compile.ir.program import Program
from xdit_compile.passes.fuse import split_concatenations as splitting
from xdit_compile.passes.fuse.fold_activations import fold_activations
from xdit_compile.passes.fuse.split_concatenations import split_concatenations
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

NARROW, WIDE = 64, 256


class Joined(nn.Module):
    """A product of a value beside an activation, as where attention and MLP have one product."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.last = nn.Linear(NARROW, WIDE), nn.Linear(NARROW + WIDE, NARROW)
        for layer in (self.wide, self.last):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([x, self.activation(self.wide(x))], -1))


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (WIDE,))


def error(program: Program, module: nn.Module, x: torch.Tensor) -> float:
    """Root of the mean squared error against float32 with the same weights."""
    (found,) = run_simulated([program], module, (x,), {})
    with torch.no_grad():
        return (found - copy.deepcopy(module).float()(x.float())).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_beside_a_folded_activation_is_as_near_to_float32_as_one_product(dtype: torch.dtype) -> None:
    """The sum is rounded once more, the activation once less. A card rounds in the same places."""
    module = Joined(tanh_gelu).to(dtype)
    x = torch.randn(8, 256, NARROW).to(dtype)
    program = capture(module, (x,), {})
    folded = fold_activations(program)
    fused = split_concatenations(folded)
    errors = [error(each, module, x) for each in (program, folded, fused)]
    assert split_concatenations.told(folded).startswith("split_concatenations: 1 ")
    assert errors[1] < errors[2] <= errors[0]


@pytest.mark.parametrize(("dtype", "changed"), [(torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 1)])
def test_a_sum_of_which_no_part_is_rounded_less_is_none_of_half_precision(dtype: torch.dtype, changed: int) -> None:
    module = Joined(norm).to(dtype)
    told = split_concatenations.told(capture(module, (torch.randn(2, 3, NARROW).to(dtype),), {}))
    assert told.startswith(f"split_concatenations: {changed} ")
    assert (f"1 apart, as {splitting.ROUNDED}" in told) == (not changed)
