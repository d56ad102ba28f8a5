"""Passes for what a split autoencoder runs on a card: norms as arithmetic, biases behind the rows of other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from splitting import partition_rows, worst_difference
from torch import fx
from zoo.autoencoders import AUTOENCODERS

from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.ir.program import Program
from xdit_compile.kernels import put_rows, scale_shift  # noqa: F401 - register the ops
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.fuse import late_biases as biases
from xdit_compile.passes.fuse.late_biases import late_biases
from xdit_compile.passes.fuse.rewriting import Fusion
from xdit_compile.passes.fuse.selection import Chooser, Found
from xdit_compile.passes.fuse.spread_norms import spread_norms
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

aten, ops = torch.ops.aten, torch.ops.xdit_compile
PASSES: Sequence[Fusion] = (spread_norms, late_biases)
QUICK = ("kl",)


def nodes(program: Program, op: object) -> list[fx.Node]:
    """Calls of an operator in all structures."""
    graphs = [structure.graph for structure in program.structures().values()]
    return [node for graph in graphs for node in graph.find_nodes(op="call_function", target=op)]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in AUTOENCODERS]
)
def test_the_same_picture_is_decoded(name: str, ranks: int) -> None:
    module, latent = AUTOENCODERS[name].build(), AUTOENCODERS[name].given("decode")
    with torch.no_grad():
        expected = [*module.decode(latent, return_dict=False)]
    inference = infer(capture(module, (latent,), {"return_dict": False}, forward=module.decode), rulebook())
    programs = []
    for partitioned in partition_rows(inference, Plan(ring=ranks)):
        program = partitioned.program
        for each in PASSES:
            program = each(program)
        programs.append(program)
        assert not nodes(program, ops.scale_shift.default)
        for writer in nodes(program, ops.put_rows.default):
            convolution = writer.args[0]
            assert isinstance(convolution, fx.Node) and (convolution.args[2] is None or name not in QUICK)
    for result in run_simulated(programs, module, (latent,), {"return_dict": False}):
        assert worst_difference(result, expected) <= 2e-5


def convolved(other_bias: bool = False, read_early: bool = False, put: bool = True) -> fx.Graph:
    """A convolution into whose result the first row of another one is put."""
    graph = fx.Graph()
    x, weight, bias, second = (graph.placeholder(name) for name in ("x", "weight", "bias", "second"))
    made = graph.call_function(aten.conv2d.default, (x, weight, bias, [1, 1], [1, 1], [1, 1], 1))
    edge = graph.call_function(aten.slice.Tensor, (x, 2, 0, 2))
    row = graph.call_function(aten.conv2d.default, (edge, weight, second if other_bias else bias, [1, 1], [0, 1]))
    early = [graph.call_function(aten.silu.default, (made,))] if read_early else []
    if put:
        graph.call_function(ops.put_rows.default, (made, row, 2, 0))
    graph.output((graph.call_function(aten.relu.default, (made,)), *early))
    return graph


def rewritten(graph: fx.Graph) -> tuple[fx.GraphModule, Found]:
    """The graph after the pass, and what that says."""
    shapes = {"x": (1, 3, 5, 4), "weight": (6, 3, 2, 3), "bias": (6,), "second": (6,)}
    yielded: dict[fx.Node, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            yielded[n] = super().run_node(n)
            return yielded[n]

    Recorder(fx.GraphModule({}, graph)).run(*(torch.empty(shape, device="meta") for shape in shapes.values()))
    found = late_biases.rewrite(graph, yielded, Chooser(late_biases.name))
    graph.lint()
    return fx.GraphModule({}, graph), found


def test_a_bias_is_added_once_behind_what_is_put_in() -> None:
    torch.manual_seed(0)
    given = [torch.randn(1, 3, 5, 4), torch.randn(6, 3, 2, 3), torch.randn(6), torch.randn(6)]
    module, found = rewritten(convolved())
    assert found.changed == 1 and not found.apart
    (expected,) = fx.GraphModule({}, convolved())(*given)
    torch.testing.assert_close(module(*given)[0], expected)
    assert [node.args[2] for node in module.graph.find_nodes(op="call_function", target=aten.conv2d.default)] == [
        None
    ] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"other_bias": True}, biases.OTHER), ({"read_early": True}, biases.READ), ({"put": False}, None)],
)
def test_a_bias_stays_where_the_result_is_another_one(changes: dict[str, bool], reason: str | None) -> None:
    module, found = rewritten(convolved(**changes))
    assert not found.changed and list(found.apart) == ([reason] if reason else [])
    assert all(
        node.args[2] is not None for node in module.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    )
