"""Group norms whose positions lie on several ranks: counts, means and deviations are joined as Chan's formula says."""

from __future__ import annotations

import pytest
import torch
from splitting import Captured, run_split
from torch import nn

from xdit_compile.capture import capture
from xdit_compile.passes.infer import infer
from xdit_compile.passes.rulebook import rulebook
from xdit_compile.plan import Plan


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
