"""Passes that are for GPUs compute the same as the module, under every split; their operators run on the CPU here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from splitting import CASES, Captured, captured
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import Compilation, compiled, run_passes
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Program
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.fuse import fold_activations as folding
from xdit_compile.passes.fuse import fusions
from xdit_compile.passes.fuse import norm_rope as heads
from xdit_compile.passes.fuse import split_concatenations as splitting
from xdit_compile.passes.fuse.fold_activations import fold_activations
from xdit_compile.passes.fuse.norm_rope import norm_rope
from xdit_compile.passes.fuse.pack_heads import pack_heads
from xdit_compile.passes.fuse.rewriting import Fusion
from xdit_compile.passes.fuse.selection import MORE, Chooser
from xdit_compile.passes.fuse.split_concatenations import split_concatenations
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

CPU = torch.device("cpu")
GPU = torch.device("cuda")
OPS = torch.ops.xdit_compile
TOLERANCE = 2e-5
DEGREES: tuple[dict[str, int], ...] = ({}, {"ulysses": 3}, {"tensor": 2}, {"ring": 2, "tensor": 3}, {"ulysses": 8})
QUICK = ("flux", "cogvideox_rotary")


def fused(name: str, plan: Plan, rank: int, device: torch.device = GPU) -> Compilation:
    """What a rank would compile for a device."""
    return fused_of(captured(name), plan, rank, device)


def fused_of(model: Captured, plan: Plan, rank: int, device: torch.device = GPU) -> Compilation:
    mesh = Mesh.simulated(plan, rank)
    state = compiled(model.analysis(plan), plan, mesh, until="hoist_positions", device=CPU)
    return run_passes(dataclasses.replace(state, device=device), after="hoist_positions", until="join_linears")


def calls(program: Program, op: Any) -> list[tuple[Any, ...]]:
    """The arguments of an operator in all structures."""
    graphs = [structure.graph for structure in program.structures().values()]
    return [node.args for graph in graphs for node in graph.find_nodes(op="call_function", target=op)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in sorted(CASES)
        if name not in ("hidream",)
    ],
)
def test_the_same_is_computed_under_every_split(name: str) -> None:
    model = captured(name)
    for degrees in DEGREES:
        plan = Plan(**degrees)
        programs = [fused(name, plan, rank).programs["call"] for rank in range(plan.world_size)]
        for result in run_simulated(programs, model.module, model.args, model.kwargs):
            for one, like in zip(pytree.tree_leaves(result), model.expected, strict=True):
                assert (one - like).abs().max() <= TOLERANCE * like.abs().max()


def test_what_is_fused_of_a_transformer_with_two_kinds_of_blocks() -> None:
    program = fused("flux", Plan(), 0).programs["call"]
    for op, count in ((OPS.norm_rope, 3), (OPS.linear_gelu, 4), (OPS.linear_of_parts, 2)):
        assert len(calls(program, op.default)) == count
    both = [len(args[0]) for args in calls(program, OPS.norm_rope.default)]
    assert sorted(both) == [2, 2, 4], "queries and keys of one stream, or of two that are joined"


@functools.lru_cache
def even() -> Captured:
    """Two kinds of blocks with four heads, and tokens that four ranks can share evenly."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 8}
    module = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, pooled_projection_dim=8, guidance_embeds=False, **sizes
    )
    given = {
        "hidden_states": torch.randn(2, 16, 8), "encoder_hidden_states": torch.randn(2, 8, 8),
        "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([0.7, 0.7]), "return_dict": False,
        "img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip
    with torch.no_grad():
        expected = pytree.tree_leaves(module.eval()(**given))
    return Captured(module, (), given, expected, infer(capture(module, (), given), rulebook()))


@pytest.mark.parametrize("ranks", [2, 4, 3])
def test_heads_are_packed_where_ulysses_sends_them(ranks: int) -> None:
    """With values, and without a copy of their own; three ranks cannot have as many heads each."""
    model, plan = even(), Plan(ulysses=ranks)
    both = []
    for left_out in ((), ("pack_heads",)):
        chosen = dataclasses.replace(plan, without=left_out)
        programs = [fused_of(model, chosen, rank).programs["call"] for rank in range(ranks)]
        both.append(programs[0])
        for result in run_simulated(programs, model.module, model.args, model.kwargs):
            for one, like in zip(pytree.tree_leaves(result), model.expected, strict=True):
                assert (one - like).abs().max() <= TOLERANCE * like.abs().max()
    packed = sorted((len(args[10]), args[11]) for args in calls(both[0], OPS.norm_rope.default))
    assert packed == ([(1, ranks), (2, ranks)] if ranks != 3 else [(0, 0), (0, 0)])
    copies = [len(calls(program, torch.ops.aten.cat.default)) for program in both]
    assert copies[1] - copies[0] == (3 if ranks != 3 else 0), "of streams of values, and of all three, twice"
    told = pack_heads.told(both[1])
    assert told.startswith(f"pack_heads: {2 if ranks != 3 else 0} buffers of heads")


def test_they_are_for_gpus_and_can_be_left_out() -> None:
    ops = [OPS.norm_rope.default, OPS.linear_gelu.default, OPS.linear_of_parts.default]
    on_cpu = fused("flux", Plan(), 0, CPU).programs["call"]
    assert not any(calls(on_cpu, op) for op in ops)
    names = ("norm_rope", "fold_activations", "split_concatenations")
    for left_out, op in zip(names, ops, strict=True):
        program = fused("flux", Plan(without=(left_out,)), 0).programs["call"]
        assert not calls(program, op) and any(calls(program, other) for other in ops)
    told = list(fusions.told(fused("flux", Plan(without=names), 0).programs["call"], ("norm_rope",), GPU))
    assert [line.split(":")[0] for line in told] == [
        "hoist_linears",
        "spread_norms",
        "late_biases",
        "join_edges",
        "fold_activations",
        "split_concatenations",
        "pack_heads",
        "join_linears",
        "join_norms",
    ]


def test_what_a_card_cannot_run_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    program = fused("flux", Plan(without=("norm_rope", "pack_heads")), 0).programs["call"]
    monkeypatch.setattr(fusions, "TRITON", False)
    told = list(fusions.told(program, (), GPU))
    assert [line for line in told if "left out" in line] == [
        f"{name}: left out, as triton is not installed" for name in ("norm_rope", "pack_heads")
    ]
    assert not calls(fused("flux", Plan(), 0).programs["call"], OPS.norm_rope.default)
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert fusions.no_triton(GPU) == "its kernels need a card of sm_80 or later"


# ---- small graphs


class Layers(nn.Module):
    """Some linear layers, and what a test does with them."""

    def __init__(self, run: Callable[[Any, torch.Tensor], torch.Tensor], bias: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.narrow = nn.Linear(8, 48, bias=bias), nn.Linear(8, 8)
        self.last, self.same = nn.Linear(56, 8), nn.Linear(48, 8)
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


def check(fusion: Fusion, module: nn.Module, x: torch.Tensor, changed: int, reason: str | None) -> Program:
    """Run a pass over a module's program: how much it changes, why not the rest, and that it computes the same."""
    program = capture(module, (x,), {})
    told = fusion.told(program)
    assert told.startswith(f"{fusion.name}: {changed} ") and ("apart" in told) == (reason is not None)
    assert reason is None or told.endswith(f"; 1 apart, as {reason}")
    rewritten = fusion(program)
    (result,) = run_simulated([rewritten], module, (x,), {})
    torch.testing.assert_close(pytree.tree_leaves(result)[0], module(x), rtol=TOLERANCE, atol=TOLERANCE)
    return rewritten


def twice(layers: Any, x: torch.Tensor) -> torch.Tensor:
    inner = layers.wide(x)
    return layers.same(F.gelu(inner, approximate="tanh")) + layers.same(inner)


@pytest.mark.parametrize(
    ("run", "bias", "changed", "reason"),
    [
        (lambda m, x: m.same(F.gelu(m.wide(x), approximate="tanh")), True, 1, None),
        (lambda m, x: m.same(F.gelu(m.wide(x))), True, 0, folding.OTHER),
        (lambda m, x: m.same(F.silu(m.wide(x))), True, 0, folding.OTHER),
        (lambda m, x: m.same(F.gelu(m.wide(x), approximate="tanh")), False, 0, folding.UNLIKE),
        (twice, True, 0, folding.USED),
        (lambda m, x: F.gelu(x, approximate="tanh"), True, 0, None),
    ],
)
def test_activations(run: Any, bias: bool, changed: int, reason: str | None) -> None:
    check(fold_activations, Layers(run, bias), torch.randn(2, 3, 8), changed, reason)


def test_what_is_written_to_stays_where_it_is() -> None:
    """A product that reads a value before somebody writes to it cannot move behind that."""
    aten, graph, shapes = torch.ops.aten, fx.Graph(), {}
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    linear = graph.call_function(aten.linear.default, (x, weight, bias))
    graph.call_function(aten.zero_.default, (x,))
    graph.output((graph.call_function(aten.gelu.default, (linear,), {"approximate": "tanh"}),))
    for node, sizes in ((x, (2, 8)), (weight, (4, 8)), (bias, (4,))):
        shapes[node] = torch.empty(sizes, device="meta")
    result = fold_activations.rewrite(graph, shapes, Chooser())
    assert result.changed == 0 and dict(result.apart) == {folding.WRITTEN: 1}


def joined_twice(layers: Any, x: torch.Tensor) -> torch.Tensor:
    both = torch.cat([layers.narrow(x), layers.wide(x)], -1)
    return layers.last(both) + both[..., :8]


@pytest.mark.parametrize(
    ("run", "changed", "reason"),
    [
        (lambda m, x: m.last(torch.cat([m.narrow(x), m.wide(x)], -1)), 1, None),
        (lambda m, x: m.last(torch.cat([m.narrow(x[0]), m.wide(x[0])], -1)), 0, MORE),
        (lambda m, x: m.last(torch.cat([m.narrow(x), m.wide(x)], 2)), 1, None),
        (lambda m, x: m.last(torch.cat([m.narrow(x), m.wide(x).relu()], -1)), 0, MORE),
        (joined_twice, 0, splitting.USED),
        (lambda m, x: m.same(torch.cat([m.wide(x), m.wide(x)], 1)), 0, None),
    ],
)
def test_concatenations(run: Any, changed: int, reason: str | None) -> None:
    check(split_concatenations, Layers(run), torch.randn(2, 3, 8), changed, reason)


HEADS, WIDTH, TOKENS = 3, 8, 5


def turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)


def of_halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def pairs(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    first, second, c, s = x[..., ::2], x[..., 1::2], c[..., ::2], s[..., ::2]
    return torch.stack([first * c - second * s, first * s + second * c], -1).flatten(-2)


def written(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    first, second, c, s = x[..., ::2], x[..., 1::2], c[..., ::2], s[..., ::2]
    found = torch.empty_like(x)
    found[..., ::2] = first * c - second * s
    found[..., 1::2] = first * s + second * c
    return found


def on_some(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 2:] = x[:, 2:] * c[:, : TOKENS - 2] + turned(x[:, 2:]) * s[:, : TOKENS - 2]
    return x


def swapped(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    x = x * c + turned(x) * s
    return torch.cat([x[:, 3:], x[:, :3]], 1)


def heads_first(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    x, c, s = (each.transpose(1, 2) for each in (x, c, s))
    return x * c + turned(x) * s


ROTATIONS: dict[str, tuple[Callable[..., torch.Tensor], int, list[int] | None, str | None]] = {
    "a turned copy": (lambda x, c, s: x * c + turned(x) * s, 1, [1], None),
    "halves": (lambda x, c, s: x * c + of_halves(x) * s, 1, [1], None),
    "pairs": (pairs, 1, [1], None),
    "writes": (written, 1, [1], None),
    "some tokens": (on_some, 1, [0, 1], None),
    "two streams": (lambda x, c, s: torch.cat([x[:, :2], x[:, 2:]], 1), 1, [0, 0], None),
    "heads first": (heads_first, 1, [1], None),
    "nothing": (lambda x, c, s: x, 0, None, heads.ALONE),
    "turned the other way": (lambda x, c, s: x * c - turned(x) * s, 0, None, heads.OTHER),
    "scaled": (lambda x, c, s: x * c, 0, None, heads.OTHER),
    "cut behind": (lambda x, c, s: (x * c + turned(x) * s)[:, 2:], 0, None, heads.TABLES),
    "swapped behind": (swapped, 0, None, heads.TABLES),
    "used before": (lambda x, c, s: x * c + turned(x) * s + x.relu(), 0, None, heads.USED),
    "three streams": (lambda x, c, s: torch.cat([x[:, :1], x[:, 1:2], x[:, 2:]], 1), 0, None, heads.MANY),
    "wider": (lambda x, c, s: (x.double() * c.double() + turned(x).double() * s.double()), 0, None, heads.ROUNDED),
}  # fmt: skip


class Rotated(nn.Module):
    """Heads of a product, normalized and rotated."""

    def __init__(self, norm: str, rotate: Callable[..., torch.Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.product, self.norm, self.rotate = nn.Linear(4, HEADS * WIDTH), norm, rotate
        self.weight = nn.Parameter(torch.randn(HEADS * WIDTH if norm == "rms_all" else WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))
        angles = torch.rand(1, TOKENS, 1, WIDTH // 2)
        angles = (
            torch.cat([angles, angles], -1) if rotate is ROTATIONS["halves"][0] else angles.repeat_interleave(2, -1)
        )
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.product(x)
        if self.norm == "rms_all":
            x = F.rms_norm(x, (HEADS * WIDTH,), self.weight, 1e-6).unflatten(-1, (HEADS, WIDTH))
            return self.rotate(x, self.cos, self.sin).relu()
        x = x.unflatten(-1, (HEADS, WIDTH))
        if self.norm == "rms":
            x = F.rms_norm(x, (WIDTH,), self.weight, 1e-6)
        elif self.norm == "layer":
            x = F.layer_norm(x, (WIDTH,), self.weight, self.bias, 1e-6)
        else:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return self.rotate(x, self.cos, self.sin).relu()


@pytest.mark.parametrize("how", ROTATIONS)
def test_rotations(how: str) -> None:
    """Whichever way a rotation is written; what is none stays as it is."""
    rotate, changed, marks, reason = ROTATIONS[how]
    program = check(norm_rope, Rotated("rms", rotate), torch.randn(2, TOKENS, 4), changed, reason)
    for args in calls(program, OPS.norm_rope.default):
        assert args[5] == marks and args[9] == (how == "halves")


@pytest.mark.parametrize("norm", ["rms", "layer", "rms_all", "written out"])
def test_norms_of_heads(norm: str) -> None:
    program = check(norm_rope, Rotated(norm, ROTATIONS["a turned copy"][0]), torch.randn(2, TOKENS, 4), 1, None)
    ((*_, kind, _, _, _),) = [args[:10] for args in calls(program, OPS.norm_rope.default)]
    assert kind == {"written out": "rms"}.get(norm, norm)
