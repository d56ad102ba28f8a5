"""Modules that read what they compute run as they are inside of a split program: experts that tokens are routed to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splitting import Captured, run_split
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.capture.capture import capture
from xdit_compile.errors import CaptureError
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan


class Experts(nn.Module):
    """Every token goes to one of three experts; one may have only so many, and leaves others as they are."""

    def __init__(self, capacity: float = 1.0):
        super().__init__()
        self.capacity, self.gate = capacity, nn.Linear(40, 3)
        self.experts = nn.ModuleList([nn.Linear(40, 40) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, 40)
        chosen = self.gate(rows).argmax(-1)
        order, made, start = chosen.argsort(stable=True), rows.clone(), 0
        for expert, count in zip(self.experts, chosen.bincount(minlength=3).tolist(), strict=True):
            some = order[start : start + min(count, int(self.capacity * len(rows)))]
            made[some] = expert(rows[some])
            start += count
        return made.view_as(x)


class Block(nn.Module):
    def __init__(self, capacity: float):
        super().__init__()
        self.project, self.out, self.experts = nn.Linear(40, 120), nn.Linear(40, 40), Experts(capacity)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.project(x).unflatten(-1, (3, 5, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.experts(x)


class Routed(nn.Module):
    def __init__(self, capacity: float = 1.0):
        super().__init__()
        self.blocks = nn.ModuleList([Block(capacity) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def captured(capacity: float) -> Captured:
    torch.manual_seed(0)
    module, x = Routed(capacity).eval(), torch.randn(2, 13, 40)
    with torch.no_grad():
        expected = pytree.tree_leaves(module(x))
    return Captured(module, (x,), {}, expected, infer(capture(module, (x,), {}), rulebook()))


@pytest.mark.parametrize("capacity", [1.0, 0.5])
def test_experts_run_as_they_are_where_tokens_lie(capacity: float) -> None:
    """With a capacity tokens compete: they are gathered, however few of them the example sends to one expert."""
    model = captured(capacity)
    (kept,) = model.inference.program.kept
    assert model.inference.program.how == "modules"
    assert kept.apart == (((0, 0), (1, 1)) if capacity == 1.0 else ())
    for plan in (Plan(ulysses=2), Plan(ring=3), Plan(tensor=2), Plan(data=2), Plan(ulysses=8, ring=2)):
        worst, ranks = run_split(model, plan)
        gathered = [gather for rank in ranks for gather in rank.ledger.gathers if "as it is" in gather.reason]
        assert worst <= 2e-5 and bool(gathered) == (capacity < 1 and plan.tensor == 1), plan


def test_a_kept_module_has_the_weights_of_today() -> None:
    model = captured(1.0)
    with torch.no_grad():
        model.module.blocks[1].experts.experts[2].weight.mul_(2)
        expected = pytree.tree_leaves(model.module(*model.args))
    worst, _ = run_split(Captured(model.module, model.args, {}, expected, model.inference), Plan(ulysses=2))
    assert worst <= 2e-5


class Outermost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(40, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, : int(self.gate(x).sum() > 0) + 1]


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Pair()

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


class Pair(Outermost):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x * 2


@pytest.mark.parametrize("module, reason", [(Outermost(), "reads values"), (Several(), "more than one tensor")])
def test_what_cannot_be_kept_is_refused(module: nn.Module, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture(module.eval(), (torch.randn(2, 13, 40),), {})
