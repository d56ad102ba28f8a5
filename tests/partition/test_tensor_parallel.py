"""Tensor parallel: heads and feed-forward channels, found in the graph, over simulated and real ranks."""

from __future__ import annotations

import math

import procs
import pytest
import torch
from splitting import Captured, captured, partition_all, run_split, worst_difference
from torch import nn
from zoo import transformers as zoo

import xdit_compile
from tests.runtime.test_runtime import run_model
from xdit_compile.capture.capture import capture, relative_difference
from xdit_compile.errors import PlanError
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import TENSOR
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

MESHES = [Plan(tensor=2), Plan(tensor=3), Plan(tensor=4), Plan(tensor=2, ulysses=2), Plan(tensor=2, ring=2)]
QUICK = ["flux", "pixart", "wan_t2v"]
UNETS = ["unet_sd15", "unet_sdxl"]


HYBRID = [Plan(cfg=2, ulysses=2, tensor=2), Plan(data=2, cfg=2, ring=2)]


def check(name: str, plan: Plan) -> None:
    model = captured(name)
    worst, ranks = run_split(model, plan)
    assert worst <= 2e-5, f"{plan}"
    assert "all_reduce" in {item.op for item in ranks[0].ledger.collectives}
    assert plan.sequence > 1 or not ranks[0].ledger.gathers
    assert ranks[0].ledger.flops_here < 0.85 * ranks[0].ledger.flops / plan.sequence


@pytest.mark.parametrize("name", [pytest.param("flux", marks=pytest.mark.slow), *QUICK[1:]])
def test_split_model_equals_the_single_device(name: str) -> None:
    for plan in MESHES:
        check(name, plan)


class Prompted(nn.Module):
    """Tokens that attend to a prompt, of which the first four come from a picture and the others from a text."""

    def __init__(self, heads: int = 3, width: int = 8):
        super().__init__()
        self.heads = heads
        self.picture, self.text = (nn.Linear(5, 64) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(64, heads * width) for _ in range(3))
        self.out = nn.Linear(heads * width, 64)

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([self.picture(prompt[:, :4]), self.text(prompt[:, 4:])], 1)
        parts = [layer(each).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, each in
                 ((self.q, x), (self.k, seen), (self.v, seen))]  # fmt: skip
        found = torch.nn.functional.scaled_dot_product_attention(*parts)
        return x + self.out(found.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("text", [0, 1])
def test_axes_of_one_and_of_nothing(tokens: int, text: int) -> None:
    module, generator = Prompted().eval(), torch.Generator().manual_seed(1)
    given = [torch.randn(1, count, width, generator=generator) for count, width in ((tokens, 64), (4 + text, 5))]
    with torch.no_grad():
        expected = module(*given)
    model = Captured(module, tuple(given), {}, [expected], infer(capture(module, tuple(given), {}), rulebook()))
    for plan in (Plan(tensor=2), Plan(tensor=3), Plan(ring=2), Plan(ulysses=3), Plan(tensor=2, ring=2)):
        ranks = partition_all(model.inference, plan)
        for found in run_simulated([rank.program for rank in ranks], module, model.args, {}):
            assert relative_difference(found, expected) < 2e-5


@pytest.mark.parametrize("name", UNETS)
def test_channels_between_convolutions_are_split(name: str) -> None:
    model = captured(name)
    inner = {key for key in dict(model.module.named_parameters()) if ".resnets." in key and "conv1.weight" in key}
    for plan in (Plan(tensor=2), Plan(tensor=3)):
        worst, ranks = run_split(model, plan)
        assert worst <= 2e-5
        sliced = {str(given.target) for given in ranks[0].program.inputs if given.pieces}
        assert inner <= sliced
        assert ranks[0].ledger.flops_here < (0.7 if plan.tensor == 2 else 0.55) * ranks[0].ledger.flops


@pytest.mark.slow
@pytest.mark.parametrize("name", UNETS)
def test_channels_on_larger_meshes(name: str) -> None:
    for plan in (Plan(tensor=4), Plan(tensor=2, ulysses=2), *HYBRID):
        assert run_split(captured(name), plan)[0] <= 2e-5, plan


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(zoo.MODELS) - set(QUICK)))
def test_every_named_model_equals_the_single_device(name: str) -> None:
    for plan in MESHES:
        check(name, plan)


@pytest.mark.parametrize("plan", HYBRID, ids=["cfg ulysses tensor", "data cfg ring"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(zoo.MODELS)]
)
def test_eight_ranks_of_three_kinds(name: str, plan: Plan) -> None:
    """A batch of one is not split: its guidance comes in calls of their own."""
    worst, ranks = run_split(captured(name), plan)
    assert worst <= 2e-5 and len(ranks) == 8
    parts = math.prod(ranks[0].layout.parts.values())
    assert parts >= 2 and ranks[0].ledger.flops_here < 1.8 / parts * ranks[0].ledger.flops


@pytest.mark.parametrize(("scheme", "share"), [("heads", 0.9), ("ffn", 0.85)])
def test_a_scheme_splits_what_it_says(scheme: str, share: float) -> None:
    both = run_split(captured("pixart"), Plan(tensor=2))[1][0]
    worst, ranks = run_split(captured("pixart"), Plan(tensor=2, split_scheme=scheme))
    assert worst <= 2e-5
    assert both.ledger.flops_here < ranks[0].ledger.flops_here < share * ranks[0].ledger.flops
    (units,) = {len(rank.layout.sharding.splits[TENSOR].units) for rank in ranks}
    assert units < len(both.layout.sharding.splits[TENSOR].units)


def run_unet(rank: int, name: str) -> float:
    model = captured(name)
    xdit_compile.parallelize(model.module, Plan(tensor=2, backend="eager"))
    return max(worst_difference(model.module(*model.args, **model.kwargs), model.expected) for _ in range(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", UNETS)
def test_channels_on_real_processes(name: str) -> None:
    assert max(procs.run(run_unet, 2, name)) <= 2e-5


@pytest.mark.parametrize("plan", [Plan(tensor=2, backend="eager"), Plan(tensor=2, ulysses=2, backend="eager")], ids=str)
def test_on_real_processes(plan: Plan) -> None:
    assert max(procs.run(run_model, plan.world_size, "pixart", plan)) <= 2e-5


class NormedHeads(nn.Module):
    """Attention of five heads whose queries and keys are normed over all heads at once, about a mean that is not 0."""

    def __init__(self, norm: nn.Module, mean: float):
        super().__init__()
        self.queries, self.keys, self.values, self.out = (nn.Linear(30, 30) for _ in range(4))
        self.norm = norm
        nn.init.constant_(self.queries.bias, mean)
        nn.init.constant_(self.keys.bias, mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.norm(self.queries(x)), self.norm(self.keys(x)), self.values(x)
        q, k, v = (value.unflatten(-1, (5, 6)).transpose(1, 2) for value in (q, k, v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Tied(nn.Module):
    """Blocks of attention, one of whose weights is used once more behind them, all of it at once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NormedHeads(nn.RMSNorm(30), 0.0) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x + self.blocks[1].queries.weight.mean()


def test_a_weight_that_is_used_in_two_ways_stays_whole() -> None:
    torch.manual_seed(0)
    module = Tied().eval().requires_grad_(False)
    args = (torch.randn(2, 7, 30),)
    model = Captured(module, args, {}, [module(*args)], infer(capture(module, args, {}), rulebook()))
    worst, ranks = run_split(model, Plan(tensor=3))
    assert worst <= 2e-5
    sliced = {str(given.target) for given in ranks[0].program.inputs if given.pieces}
    queries = {f"blocks.{block}.queries.weight" for block in range(4)}
    assert queries - sliced in ({"blocks.1.queries.weight"}, queries)
    assert "blocks.1.values.weight" in sliced


NORMS = {
    "layer": lambda: nn.LayerNorm(30),
    "layer without bias": lambda: nn.LayerNorm(30, bias=False),
    "layer without weights": lambda: nn.LayerNorm(30, elementwise_affine=False),
    "root mean square": lambda: nn.RMSNorm(30),
    "root mean square of a given epsilon": lambda: nn.RMSNorm(30, eps=0.3),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_over_all_heads_join_their_statistics(norm: str) -> None:
    torch.manual_seed(0)
    module = NormedHeads(NORMS[norm](), 30.0).eval().requires_grad_(False)
    for parameter in module.norm.parameters():
        parameter.normal_(1.0, 0.3)
    args = (torch.randn(2, 7, 30),)
    model = Captured(module, args, {}, [module(*args)], infer(capture(module, args, {}), rulebook()))
    for plan in (Plan(tensor=2), Plan(tensor=3), Plan(tensor=3, ulysses=2), Plan(tensor=5, cfg=2)):
        worst, ranks = run_split(model, plan)
        assert worst <= 2e-5
        assert sum(item.purpose == "norm statistics" for item in ranks[0].ledger.collectives) == 2
        assert plan.sequence * plan.cfg > 1 or not ranks[0].ledger.gathers


def test_more_ranks_than_heads_and_channels_are_refused() -> None:
    with pytest.raises(PlanError, match="tensor=512 is more than this model's heads or feed-forward channels allow"):
        choose_units(captured("pixart").inference, Plan(tensor=512))
    with pytest.raises(PlanError, match="tensor=16 is more than this model's heads allow; choose at most"):
        choose_units(captured("pixart").inference, Plan(tensor=16, split_scheme="heads"))
