"""Positions leave structures: the same is computed, and ranks and patches that differ in nothing else share them."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from splitting import captured
from torch import fx

from xdit_compile.backends.target.pretend_card import DEVICE as CARD
from xdit_compile.backends.target.pretend_card import kept_on_host
from xdit_compile.cache.graphs import canonical
from xdit_compile.compiler import Analysis, analyse, compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Input, Program
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.local.local_graph import ROWS
from xdit_compile.passes.partition.hoist_positions import hoist_positions
from xdit_compile.plan import Plan
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

aten, ops = torch.ops.aten, torch.ops.xdit_compile
CPU = torch.device("cpu")
LARGE: dict[str, Any] = {}
SMALL: dict[str, Any] = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 8, "in_channels": 8,
    "joint_attention_dim": 24, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def even(tokens: int, text: int, **config: Any) -> Analysis:
    """FLUX with counts that divide, on the meta device."""
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(**config).eval()
        size = module.config
        kwargs = {
            "hidden_states": torch.empty(1, tokens, size.in_channels),
            "encoder_hidden_states": torch.empty(1, text, size.joint_attention_dim),
            "pooled_projections": torch.empty(1, size.pooled_projection_dim),
            "timestep": torch.empty(1), "img_ids": torch.empty(tokens, 3), "txt_ids": torch.empty(text, 3),
        }  # fmt: skip
    return analyse(module, Plan(ulysses=2), (), kwargs)


def structures(analysis: Analysis, plan: Plan, rank: int) -> dict[str, set[str]]:
    """Digests of the structures that a rank runs, by program, with groups by role as they run."""
    again = Analysis(analysis.program, analysis.inference, choose_units(analysis.inference, plan))
    state = compiled(again, plan, Mesh.named(plan, rank), until="hoist_positions", device=CPU)
    digests = {name: map(canonical, program.structures().values()) for name, program in state.programs.items()}
    return {name: {digest for _, digest in each} for name, each in digests.items()}


@pytest.mark.parametrize(
    ("tokens", "text", "config"),
    [(64, 16, SMALL), pytest.param(4096, 512, LARGE, marks=pytest.mark.slow)],
    ids=["small", "full size"],
)
def test_ranks_and_patches_of_one_size_share_structures(tokens: int, text: int, config: dict[str, Any]) -> None:
    analysis = even(tokens, text, **config)
    ranks = [structures(analysis, Plan(ulysses=8), rank)["call"] for rank in range(8)]
    alike = set.intersection(*ranks)
    columns = [rank - alike for rank in ranks]
    assert all(len(own) <= (tokens == 4096) for own in columns), "but each rank's columns of the modulations"
    programs = structures(analysis, Plan(patches=4), 0)
    of_patches = [programs[f"patch_{patch}"] for patch in range(4)]
    assert of_patches[1] == of_patches[2] == of_patches[3]
    assert len(set.union(*of_patches)) <= 2 * len(of_patches[0])
    stale = [structures(analysis, Plan(distrifusion=2), rank) for rank in range(2)]
    assert stale[0] == stale[1] and len(stale[0]["waiting"] | stale[0]["stale"]) < 2 * len(stale[0]["stale"])


@pytest.mark.parametrize("degrees", [{"ulysses": 3}, {"ring": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_the_same_is_computed(name: str, degrees: dict[str, int]) -> None:
    model, plan = captured(name), Plan(**degrees)
    analysis = model.analysis(plan)
    for end in ("partition", "hoist_positions"):
        states = [
            compiled(analysis, plan, Mesh.simulated(plan, rank), until=end, device=CPU)
            for rank in range(plan.world_size)
        ]
        found = run_simulated([state.programs["call"] for state in states], model.module, model.args, model.kwargs)
        if end == "partition":
            expected = found
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def program_of(build: Any) -> Program:
    """A program whose root calls one structure on three inputs."""
    inner = fx.Graph()
    inner.output(tuple(build(inner, *(inner.placeholder(name) for name in "xyz"))))
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in "abc"]
    for node in given:
        node.meta["val"] = torch.empty(6, 4, device="meta")
    table = torch.arange(3.0)
    structure = fx.GraphModule({"table": table}, inner)
    call = graph.create_node("call_module", "structure", tuple(given))
    graph.output((graph.call_function(operator.getitem, (call, 0)),))
    inputs = tuple(Input(node.name, "user", at) for at, node in enumerate(given))
    root = fx.GraphModule({"structure": structure}, graph)
    return Program(root, inputs, {}, None, None)  # type: ignore[arg-type]


def test_what_is_written_to_is_not_sliced_before() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node, z: fx.Node) -> list[fx.Node]:
        graph.call_function(ops.put_rows.default, (x, graph.call_function(aten.slice.Tensor, (y, 0, 1, 3)), 0, 2))
        table = graph.call_function(aten.slice.Tensor, (graph.get_attr("table"), 0, 0, 1))
        rows = graph.call_function(aten.slice.Tensor, (x, 0, 2, 4))
        return [graph.call_function(aten.add.Tensor, (graph.call_function(aten.add.Tensor, (rows, table)), z))]

    program = hoist_positions(program_of(build), CPU)
    structure = program.structures()["structure"].graph
    called = sorted(str(node.target) for node in structure.nodes if node.op == "call_function")
    assert called == [*["aten.add.Tensor"] * 2, *["aten.slice.Tensor"] * 2, "xdit_compile.put_rows_at.default"]
    assert program.root.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    x, y, z = torch.zeros(6, 4), torch.arange(24.0).reshape(6, 4), torch.ones(2, 4)
    values = [x, y, z, *(program.constants[str(each.target)] for each in program.inputs[3:])]
    (found,) = program.root(*values)
    assert torch.equal(found, y[1:3] + 1) and torch.equal(x[2:4], y[1:3])


def test_on_cuda_rows_that_stay_are_written_by_what_computes_them() -> None:
    """One scatter for each tensor that is kept, which inductor fuses with what comes before."""
    model, plan = captured("flux"), Plan(distrifusion=2)
    analysis = model.analysis(plan)
    for rank in range(2):
        with kept_on_host():
            state = compiled(analysis, plan, Mesh.simulated(plan, rank), until="hoist_positions", device=CARD)
        for structure in state.programs["stale"].structures().values():
            targets = Counter(node.target for node in structure.graph.nodes)
            assert targets[aten.index_copy_.default] == 2 * targets[ops.attention.default]
            assert not targets[ops.put_rows_at.default]


@pytest.mark.parametrize("device", [CPU, CARD], ids=str)
def test_rows_are_put_where_an_input_says(device: torch.device) -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node, z: fx.Node) -> list[fx.Node]:
        put = graph.call_function(ops.put_rows.default, (x, graph.call_function(aten.relu.default, (y,)), 0, 2))
        put.meta[ROWS] = 3
        return [graph.call_function(aten.add.Tensor, (x, z))]

    with kept_on_host():
        program = hoist_positions(program_of(build), device)
    x, y, z = torch.zeros(6, 4), torch.randn(3, 4), torch.ones(6, 4)
    (found,) = program.root(x, y, z, *(program.constants[str(each.target)] for each in program.inputs[3:]))
    expected = torch.zeros(6, 4)
    expected[2:5] = y.relu()
    assert torch.equal(x, expected) and torch.equal(found, expected + 1)


def test_arguments_may_come_after_what_uses_others() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node, z: fx.Node) -> list[fx.Node]:
        rows = [graph.call_function(aten.slice.Tensor, (each, 0, 1, 3)) for each in (x, y)]
        made = graph.call_function(aten.cat.default, (rows, 0))
        made.append(z)
        return [made, z]

    program = hoist_positions(program_of(build), CPU)
    x, y, z = torch.zeros(6, 4), torch.ones(6, 4), torch.full((6, 4), 2.0)
    (found,) = program.root(x, y, z)
    assert torch.equal(found, torch.cat([x[1:3], y[1:3]]))


def test_what_only_slices_is_gone() -> None:
    model = captured("flux")
    plan = Plan(ulysses=2)
    state = compiled(model.analysis(plan), plan, Mesh.simulated(plan, 0), until="hoist_positions", device=CPU)
    before = compiled(model.analysis(plan), plan, Mesh.simulated(plan, 0), until="partition", device=CPU)
    gone = set(before.programs["call"].structures()) - set(state.programs["call"].structures())
    assert gone == {"slice_inputs"}
