"""Operators that look at neighbouring rows, split by rows: convolutions, pads, resizes, pools, slices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from splitting import partition_rows
from torch import nn
from torch.nn import functional as F

from xdit_compile.capture.capture import capture
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.memory.tile_rows import cut_into
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan
from xdit_compile.runtime.verify.simulated_mesh import run_simulated


class Does(nn.Module):
    """A function between two convolutions of one size, so that what it is given and what it makes lie split."""

    def __init__(self, function: Any, rank: int, channels: int = 4, made: int | None = None) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        self.before, self.after = conv(channels, channels, 3, padding=1), conv(made or channels, channels, 3, padding=1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.function(self.before(x)))


def weight(*shape: int) -> torch.Tensor:
    return (torch.arange(math.prod(shape)) * 12.9898).sin().view(shape) / 4


ROWS = (1, 4, 13, 6)
CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "kernel 5": (lambda x: F.conv2d(x, weight(4, 4, 5, 5), padding=2), ROWS, {}),
    "kernel 4, one more row": (lambda x: F.conv2d(x, weight(4, 4, 4, 4), padding=2), ROWS, {}),
    "kernel 2, one row less": (lambda x: F.conv2d(x, weight(4, 4, 2, 2)), ROWS, {}),
    "no padding": (lambda x: F.conv2d(x, weight(4, 4, 3, 3), weight(4)), ROWS, {}),
    "much padding": (lambda x: F.conv2d(x, weight(4, 4, 3, 3), padding=4), ROWS, {}),
    "kernel wider than a share": (lambda x: F.conv2d(x, weight(4, 4, 11, 3), padding=(5, 1)), ROWS, {}),
    "dilated": (lambda x: F.conv2d(x, weight(4, 4, 3, 3), padding=3, dilation=3), ROWS, {}),
    "stride 2 of odd": (lambda x: F.conv2d(x, weight(4, 4, 3, 3), stride=2, padding=1), ROWS, {}),
    "stride 2 of even": (lambda x: F.conv2d(x, weight(4, 4, 3, 3), stride=2, padding=1), (1, 4, 14, 6), {}),
    "stride 3, kernel 5": (lambda x: F.conv2d(x, weight(4, 4, 5, 5), stride=3, padding=2), (1, 4, 29, 9), {}),
    "stride wider than the kernel": (lambda x: F.conv2d(x, weight(4, 4, 2, 2), stride=3), (1, 4, 29, 9), {}),
    "stride 2, kernel 1": (lambda x: F.conv2d(x, weight(4, 4, 1, 1), stride=2), ROWS, {}),
    "patches with a rest": (lambda x: F.conv2d(x, weight(4, 4, 2, 2), stride=2), ROWS, {}),
    "depthwise": (lambda x: F.conv2d(x, weight(4, 1, 3, 3), padding=1, groups=4), ROWS, {}),
    "grouped": (lambda x: F.conv2d(x, weight(4, 2, 3, 3), padding=1, groups=2), ROWS, {}),
    "causal": (lambda x: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), weight(4, 4, 3, 3, 3)), (1, 4, 3, 13, 6), {}),
    "3D with stride": (lambda x: F.conv3d(x, weight(4, 4, 3, 3, 3), stride=2, padding=1), (1, 4, 3, 13, 6), {}),
    "one dim": (lambda x: F.conv1d(x, weight(4, 4, 3), stride=2, padding=1), (1, 4, 23), {}),
    "transposed": (lambda x: F.conv_transpose2d(x, weight(4, 4, 4, 4), weight(4), stride=2, padding=1), ROWS, {}),
    "transposed, one more row": (
        lambda x: F.conv_transpose2d(x, weight(4, 4, 3, 3), None, stride=2, padding=1, output_padding=1), ROWS, {},
    ),
    "transposed in 1D": (lambda x: F.conv_transpose1d(x, weight(4, 4, 7), stride=3, padding=2), (1, 4, 23), {}),
    "transposed and dilated": (
        lambda x: F.conv_transpose2d(x, weight(4, 2, 3, 3), stride=2, dilation=3, groups=2), ROWS, {},
    ),
    "zeros around": (lambda x: F.pad(x, (1, 2, 3, 1)), ROWS, {}),
    "ones below": (lambda x: F.pad(x, (0, 1, 0, 1), value=1.0), ROWS, {}),
    "cropped": (lambda x: F.pad(x, (0, 0, -2, -1)), ROWS, {}),
    "replicated": (lambda x: F.pad(x, (2, 2, 3, 1), mode="replicate"), ROWS, {}),
    "reflected": (lambda x: F.pad(x, (2, 2, 3, 5), mode="reflect"), ROWS, {}),
    "wrapped": (lambda x: F.pad(x, (2, 2, 1, 2), mode="circular"), ROWS, {}),
    "replicated in 3D": (lambda x: F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), (1, 4, 3, 13, 6), {}),
    "reflected in 1D": (lambda x: F.pad(x, (3, 4), mode="reflect"), (1, 4, 23), {}),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), ROWS, {}),
    "nearest to a size": (lambda x: F.interpolate(x, size=(31, 9)), ROWS, {}),
    "nearest to less": (lambda x: F.interpolate(x, size=(9, 5)), ROWS, {}),
    "nearest by a factor": (lambda x: F.interpolate(x, scale_factor=1.7), ROWS, {}),
    "nearest by nearly two": (lambda x: F.interpolate(x, scale_factor=2.02), ROWS, {}),
    "nearest-exact": (lambda x: F.interpolate(x, size=(20, 9), mode="nearest-exact"), ROWS, {}),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), ROWS, {}),
    "bilinear to less": (lambda x: F.interpolate(x, size=(9, 11), mode="bilinear"), ROWS, {}),
    "bilinear by corners": (lambda x: F.interpolate(x, size=(30, 9), mode="bilinear", align_corners=True), ROWS, {}),
    "bilinear by a factor": (
        lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=False), ROWS, {},
    ),
    "trilinear": (lambda x: F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear"), (1, 4, 3, 13, 6), {}),
    "linear": (lambda x: F.interpolate(x, size=50, mode="linear"), (1, 4, 23), {}),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), ROWS, {"made": 1}),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (1, 4, 14, 6), {"made": 16}),
    "average pool": (lambda x: F.avg_pool2d(x, 2), (1, 4, 14, 6), {}),
    "overlapping pool": (lambda x: F.avg_pool2d(x, 3, stride=1), ROWS, {}),
    "pool of odd": (lambda x: F.max_pool2d(x, 2), ROWS, {}),
    "every other row": (lambda x: x[:, :, 1::2], ROWS, {}),
    "middle rows": (lambda x: x[:, :, 3:-2], ROWS, {}),
    "rows of a pad taken off": (lambda x: F.conv2d(F.pad(x, (0, 0, 2, 2)), weight(4, 4, 3, 3))[:, :, 1:-1], ROWS, {}),
    "group norm": (lambda x: F.group_norm(x, 2, weight(4), weight(4)), ROWS, {}),
    "group norm in 3D": (lambda x: F.group_norm(x, 2), (1, 4, 3, 13, 6), {}),
    "group norm of rows alone": (lambda x: F.group_norm(x, 2), (1, 4, 23), {}),
    "frames in the batch": (
        lambda x: F.group_norm(x.transpose(1, 2).flatten(0, 1), 2).unflatten(0, (1, 3)).transpose(1, 2),
        (1, 4, 3, 13, 6), {},
    ),
    "layer norm over channels": (
        lambda x: F.layer_norm(x.movedim(1, -1), (4,), weight(4)).movedim(-1, 1), ROWS, {},
    ),
    "RMS norm over channels": (lambda x: F.normalize(x, dim=1) * 2, ROWS, {}),
    "up, padded and down": (
        lambda x: F.conv2d(F.pad(F.interpolate(x, scale_factor=2), (0, 1, 0, 1)), weight(4, 4, 3, 3), stride=2),
        ROWS, {},
    ),
}  # fmt: skip


def typed(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor, Inference]:
    function, shape, options = CASES[name]
    torch.manual_seed(0)
    module = Does(function, len(shape) - 2, **options).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = module(x)
    return module, x, expected, infer(capture(module, (x,), {}), rulebook())


@pytest.mark.parametrize("name", CASES)
def test_it_is_exact_and_gathers_nothing(name):
    module, x, expected, inference = typed(name)
    for parts in (2, 3, 5, 8):
        ranks = partition_rows(inference, Plan(ring=parts), gather=False)
        strips = run_simulated([rank.program for rank in ranks], module, (x,), {})
        assert [gather.reason for rank in ranks for gather in rank.ledger.gathers] == []
        dim = max(expected.dim() - 2, 2)
        found = torch.cat(strips, dim)
        assert found.shape == expected.shape
        assert all(strip.shape[dim] < expected.shape[dim] for strip in strips)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_it_is_exact_in_strips(name):
    module, x, expected, inference = typed(name)
    for parts in (1, 3):
        plan = Plan(ring=parts, vae="patch", vae_memory="1kB")
        programs = [cut_into(rank.program, 3, 0) for rank in partition_rows(inference, plan)]
        for found in run_simulated(programs, module, (x,), {}):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
