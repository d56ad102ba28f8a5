"""Group norms whose positions lie on several ranks: counts, means and deviations are joined as Chan's formula says."""

from __future__ import annotations

import pytest
import torch
from splitting import Captured, partition_rows, run_split
from torch import nn

from xdit_compile.capture.capture import capture
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

SCALE_SHIFT = torch.ops.xdit_compile.scale_shift.default


class Grid(nn.Module):
    """A group norm over a grid far from a mean of 0, then attention between its places, which are what is split."""

    def __init__(self, affine: bool, rank: int, mean: float):
        super().__init__()
        self.norm = nn.GroupNorm(4, 12, affine=affine)
        self.mix = nn.Linear(12, 12)
        self.rank, self.mean = rank, mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = x.shape
        grid = x.flatten(2) if self.rank == 3 else x
        tokens = self.norm(grid + self.mean).flatten(2).transpose(1, 2)
        mixed = self.mix(tokens).unsqueeze(1)
        mixed = nn.functional.scaled_dot_product_attention(mixed, mixed, mixed).squeeze(1)
        return mixed.transpose(1, 2).reshape(shape)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize(("rank", "shape"), [(3, (7, 5)), (4, (7, 5)), (5, (3, 7, 5))])
def test_a_group_norm_over_split_places(rank: int, shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    module = Grid(affine, rank, 100.0).eval().requires_grad_(False)
    for parameter in module.norm.parameters():
        parameter.normal_(1.0, 0.3)
    args = (torch.randn(2, 12, *shape),)
    model = Captured(module, args, {}, [module(*args)], infer(capture(module, args, {}), rulebook()))
    program = model.inference.program
    (name,) = (given.name for given in program.inputs if given.kind == "user")
    (grid,) = (node for node in program.root.graph.nodes if node.name == name)
    rows = model.inference.axes[grid][0][-2]
    assert rows.size == 7
    for plan in (Plan(ulysses=2), Plan(ring=3), Plan(ulysses=4), Plan(ring=8)):
        worst, ranks = run_split(model, plan, ((rows,),))
        assert worst <= 2e-5, plan
        (joined,) = (item for item in ranks[0].ledger.collectives if item.purpose == "norm statistics")
        assert joined.op == "all_gather" and joined.elements == 2 * 2 * 4 * (plan.sequence - 1)


@pytest.mark.parametrize("memory", [None, "1kB"], ids=["whole", "in pieces"])
@pytest.mark.parametrize("parts", [2, 3, 8])
def test_statistics_of_bfloat16_are_float32(parts: int, memory: str | None) -> None:
    """The result is the one in float32 but for its last rounding, far from a mean of 0 too."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 12)
    norm.weight.data.normal_(1.0, 0.3)
    copy = nn.Conv2d(12, 12, 3, padding=1, bias=False)
    nn.init.dirac_(copy.weight)
    module = nn.Sequential(copy, norm).eval().requires_grad_(False).bfloat16()
    x = (torch.randn(2, 12, 7, 5) + 5).bfloat16()
    expected = module.float()(x.float())
    module.bfloat16()
    inference = infer(capture(module, (x,), {}), rulebook())
    ranks = partition_rows(inference, Plan(ring=parts, vae="patch", vae_memory=memory))
    assert any(item.purpose == "norm statistics" for item in ranks[0].ledger.collectives)
    for found in run_simulated([rank.program for rank in ranks], module, (x,), {}):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scale_and_shift(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.randn(2, 6, 3, 5).to(dtype)
    scale, shift = (torch.randn(2, 6, 1, 1, dtype=wide) for _ in range(2))
    exact = x.double() * scale.double() + shift.double()
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        found = SCALE_SHIFT(given, scale, shift)
        assert found.dtype == dtype and found.shape == x.shape
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert SCALE_SHIFT(x[:, :, :0], scale, shift).shape == (2, 6, 0, 5)
    with pytest.raises(ValueError, match="batch and channels must be the same"):
        SCALE_SHIFT(x, scale[:1], shift[:1])
    torch.library.opcheck(SCALE_SHIFT, (x, scale, shift))
