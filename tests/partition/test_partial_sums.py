"""Partial sums of which ranks want their own positions alone: added up for these, not for all."""

from __future__ import annotations

from typing import Any

import procs
import pytest
import torch
from splitting import partition_all, worst_difference
from torch import nn

import xdit_compile
from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

TOKENS = 11


class Mixer(nn.Module):
    """Attention, and a product over tokens as MLP-Mixer has it (arXiv:2105.01601), whose sum is read once."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(24, 72)
        self.mix = nn.Parameter(torch.randn(TOKENS, TOKENS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inward(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + torch.einsum("ts,bsc->btc", self.mix, x)


def model() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Mixer().eval(), torch.randn(2, TOKENS, 24)


@pytest.mark.parametrize("plan", [Plan(ulysses=2), Plan(ring=3), Plan(ulysses=2, ring=2), Plan(allgather=3)], ids=str)
def test_a_sum_that_is_read_by_positions_is_scattered(plan: Plan) -> None:
    module, x = model()
    ranks = partition_all(infer(capture(module, (x,), {}), rulebook()), plan)
    for found in run_simulated([rank.program for rank in ranks], module, (x,), {}):
        assert worst_difference(found, [module(x)]) < 2e-5
    for rank in ranks:
        sums = [item for item in rank.ledger.collectives if item.purpose == "partial sum"]
        assert [item.op for item in sums] == ["reduce_scatter"] and sums[0].elements < x.numel()


def compiled(rank: int, backend: str) -> Any:
    module, x = model()
    expected = module(x)
    xdit_compile.parallelize(module, Plan(ulysses=2, backend=backend))
    return worst_difference(module(x), [expected])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_ranks_that_are_processes(backend: str) -> None:
    assert max(procs.run(compiled, 2, backend)) < 2e-5
