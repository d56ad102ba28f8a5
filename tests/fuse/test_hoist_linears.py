"""Linears that blocks compute of one value alike leave them, and ranks that share tokens share their columns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import procs
import pytest
import torch
from diffusers import FluxTransformer2DModel
from splitting import CASES, Captured, captured, worst_difference
from torch import fx, nn
from torch.nn import functional as F

import xdit_compile
from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import Analysis, compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Program
from xdit_compile.ir.verify_program import verify_program
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.fuse import hoist_linears as hoisting
from xdit_compile.passes.fuse import join_linears as joining
from xdit_compile.passes.fuse.hoist_linears import hoist_linears
from xdit_compile.passes.lowering import small_linear
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

OPS = torch.ops.xdit_compile
LINEAR = torch.ops.aten.linear.default
TOLERANCE = 2e-5
DEGREES: tuple[dict[str, int], ...] = ({}, {"ulysses": 3}, {"ring": 2, "tensor": 2}, {"ulysses": 2, "ring": 4})
QUICK = ("flux",)


def programs(model: Captured, plan: Plan) -> list[Program]:
    """What every rank compiles."""
    program = hoist_linears(model.inference.program)
    inference = infer(program, rulebook())
    analysis = Analysis(program, inference, choose_units(inference, plan))
    ranks = [Mesh.simulated(plan, rank) for rank in range(plan.world_size)]
    return [compiled(analysis, plan, mesh, until="join_linears").programs["call"] for mesh in ranks]


def count(program: Program, op: Any, *, hoisted: bool) -> int:
    """Calls of an operator in one run of the program: in what was hoisted, or in all else."""
    structures = program.structures()
    of_kind = [call for call in program.calls() if str(call.target).startswith(hoisting.NAME) == hoisted]
    return sum(len(structures[str(call.target)].graph.find_nodes(op="call_function", target=op)) for call in of_kind)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in sorted(CASES)
        if name not in ("hidream",)
    ],
)
def test_the_same_is_computed_under_every_split(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of models as small as these nobody would gather columns, nor would they fill several joined tensors."""
    monkeypatch.setattr(small_linear, "WORTH_A_GATHER", 0)
    monkeypatch.setattr(joining, "MOST_BYTES", 2**12)
    model = captured(name)
    verify_program(hoist_linears(model.inference.program), name)
    for degrees in DEGREES:
        results = run_simulated(programs(model, Plan(**degrees)), model.module, model.args, model.kwargs)
        assert max(worst_difference(result, model.expected) for result in results) <= TOLERANCE


@functools.lru_cache
def two_kinds() -> Captured:
    """Blocks of two kinds, and a batch of two with time steps of their own."""
    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, num_attention_heads=8, attention_head_dim=16,
        axes_dims_rope=(4, 6, 6), joint_attention_dim=8, pooled_projection_dim=8, guidance_embeds=False,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 15, 8), "encoder_hidden_states": torch.randn(2, 6, 8),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([0.7, 0.2]), "return_dict": False,
        "img_ids": torch.randn(15, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    with torch.no_grad():
        expected = [*module.eval()(**given)]
    return Captured(module, (), given, expected, infer(capture(module, (), given), rulebook()))


def test_one_product_computes_all_modulations_before_the_blocks() -> None:
    model = two_kinds()
    (program,) = programs(model, Plan())
    assert count(program, LINEAR, hoisted=True) == 1
    assert count(program, torch.ops.aten.silu.default, hoisted=False) == 2, "in what makes the value"
    assert hoisting.told(hoist_linears(model.inference.program)).startswith("hoist_linears: 7 linears of few rows")
    assert worst_difference(run_simulated([program], model.module, model.args, model.kwargs)[0], model.expected) <= 2e-5


@pytest.mark.parametrize(("degrees", "weights"), [({"ulysses": 4}, 0.25), ({"ulysses": 2, "ring": 2}, 0.25)])
def test_ranks_that_share_tokens_read_a_share_of_the_weights_and_gather_once(
    degrees: dict[str, int], weights: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_linear, "WORTH_A_GATHER", 0)
    model = two_kinds()
    ranks = programs(model, Plan(**degrees))
    results = run_simulated(ranks, model.module, model.args, model.kwargs)
    assert max(worst_difference(result, model.expected) for result in results) <= TOLERANCE
    whole = sum(each.numel() for name, each in model.module.named_parameters() if "norm" in name and "linear" in name)
    for program in ranks:
        assert count(program, OPS.all_gather.default, hoisted=True) == 1
        assert abs(_read(program) / whole - weights) < 0.01


def _read(program: Program) -> int:
    """Elements of parameters that what was hoisted is given in one call."""
    nodes = [call for call in program.calls() if str(call.target).startswith(hoisting.NAME)]
    sizes = 0
    for argument in (argument for call in nodes for argument in call.args):
        if isinstance(argument, fx.Node) and argument.target is torch.ops.aten.slice.Tensor:
            source, _, start, stop = argument.args
            shape = source.meta["val"].shape
            sizes += (stop - start) * shape[1:].numel()
        elif isinstance(argument, fx.Node) and argument.op == "placeholder":
            sizes += argument.meta["val"].numel()
    return sizes


def test_ranks_compute_all_columns_where_a_gather_is_not_worth_it_or_the_plan_leaves_it_out() -> None:
    small = programs(captured("flux"), Plan(ulysses=2))
    plan = Plan(ulysses=4, without=("hoist_linears",))
    analysis = two_kinds().analysis(plan)
    left_out = compiled(analysis, plan, Mesh.simulated(plan, 0), until="join_linears").programs["call"]
    gathers = [count(program, OPS.all_gather.default, hoisted=True) for program in (*small, left_out)]
    assert gathers == [0, 0, 0]
    assert count(left_out, OPS.all_gather.default, hoisted=False) == 1, "of the result"


class Blocks(nn.Module):
    """Blocks with a linear of what all of them are given."""

    def __init__(self, change: Callable[[torch.Tensor, int], torch.Tensor] = lambda value, at: value) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.first, self._change = nn.Linear(64, 64), change

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shared = self.first(condition)
        for at, block in enumerate(self.blocks):
            x = block(x, self._change(shared, at))
        return x


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.linear = nn.Linear(64, 128), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(F.silu(shared))[..., None, :].chunk(2, -1)
        return x + self.linear(x * scale + shift)


def _hoisted(module: nn.Module, condition: torch.Tensor) -> str:
    return hoisting.told(hoist_linears(capture(module, (torch.randn(2, 5, 64), condition), {})))


def test_what_is_not_shared_or_has_many_rows_stays() -> None:
    few, many = torch.randn(2, 64), torch.randn(2, 5, 64)
    assert "3 linears of few rows before the blocks in 1 calls" in _hoisted(Blocks(), few)
    assert "0 linears" in _hoisted(Blocks(lambda value, at: value + at), few), "each block is given another value"
    assert "0 linears" in _hoisted(Rows(), many)


class Rows(Blocks):
    """Every token has a condition of its own."""

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shared = self.first(condition)
        for block in self.blocks:
            scale, shift = block.modulation(F.silu(shared)).chunk(2, -1)
            x = x + block.linear(x * scale + shift)
        return x


def on_ranks(rank: int, plan: dict[str, Any]) -> list[float]:
    """How far calls are from the module's own: two sizes, then with other weights in one block."""
    model = two_kinds()
    module, given = model.module, model.kwargs
    calls = [given, {**given, "hidden_states": torch.ones(2, 12, 8), "img_ids": torch.ones(12, 3)}]
    calls = [{**each, "return_dict": True} for each in (*calls, given)]

    def change() -> None:
        module.transformer_blocks[1].norm1.linear.weight.mul_(1.5)

    wanted = []
    with torch.no_grad():
        for number, each in enumerate(calls):
            change() if number == 2 else None
            wanted.append(module(**each).sample)
        module.transformer_blocks[1].norm1.linear.weight.div_(1.5)
        small_linear.WORTH_A_GATHER = 0
        xdit_compile.parallelize(module, Plan(**plan, timeout_s=60))
        apart = []
        for number, (each, like) in enumerate(zip(calls, wanted, strict=True)):
            change() if number == 2 else None
            apart.append(worst_difference([module(**each).sample], [like]))
    assert "hoist_linears: 7 linears" in str(xdit_compile.explain(module))
    return apart


@pytest.mark.parametrize(
    ("degrees", "backend"),
    [({"ulysses": 2}, "eager"), pytest.param({"ring": 2}, "inductor", marks=pytest.mark.slow)],
)
def test_processes_compute_what_the_module_does(degrees: dict[str, int], backend: str, tmp_path: Any) -> None:
    for apart in procs.run(on_ranks, 2, {**degrees, "backend": backend, "cache": str(tmp_path)}, timeout=300):
        assert max(apart) < TOLERANCE
