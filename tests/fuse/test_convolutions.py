"""Passes for what a split autoencoder runs on a card: norms, biases, and rows that come of other ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from splitting import partition_rows, worst_difference
from torch import fx
from torch._inductor.utils import run_and_get_code
from zoo.autoencoders import AUTOENCODERS

from xdit_compile import Plan
from xdit_compile.backends.inductor_order import options_for, pin_order
from xdit_compile.capture.capture import capture
from xdit_compile.ir.program import Program
from xdit_compile.kernels import put_rows, scale_shift  # noqa: F401 - register the ops
from xdit_compile.kernels.collectives import halo  # noqa: F401
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.fuse import join_edges as edges
from xdit_compile.passes.fuse import late_biases as biases
from xdit_compile.passes.fuse.join_edges import join_edges
from xdit_compile.passes.fuse.late_biases import late_biases
from xdit_compile.passes.fuse.rewriting import Fusion
from xdit_compile.passes.fuse.selection import Chooser, Found
from xdit_compile.passes.fuse.spread_norms import spread_norms
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

aten, ops = torch.ops.aten, torch.ops.xdit_compile
PASSES: Sequence[Fusion] = (spread_norms, late_biases, join_edges)
QUICK = ("kl",)


def nodes(program: Program, op: object) -> list[fx.Node]:
    """Calls of an operator in all structures."""
    graphs = [structure.graph for structure in program.structures().values()]
    return [node for graph in graphs for node in graph.find_nodes(op="call_function", target=op)]


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in AUTOENCODERS]
)
def test_the_same_picture_is_decoded(name: str, ranks: int) -> None:
    module, latent = AUTOENCODERS[name].build(), AUTOENCODERS[name].given("decode")
    with torch.no_grad():
        expected = [*module.decode(latent, return_dict=False)]
    inference = infer(capture(module, (latent,), {"return_dict": False}, forward=module.decode), rulebook())
    programs, joined = [], []
    for partitioned in partition_rows(inference, Plan(ring=ranks)):
        program = partitioned.program
        for each in PASSES:
            program = each(program)
        programs.append(program)
        joined.append(len(nodes(program, ops.halo_finish_both.default)))
        if name in QUICK:
            assert bool(joined[-1]) != bool(nodes(program, ops.halo_finish.default)), "none of a rank is left apart"
        assert not nodes(program, ops.scale_shift.default)
        for writer in nodes(program, ops.put_rows.default):
            convolution = writer.args[0]
            assert isinstance(convolution, fx.Node) and (convolution.args[2] is None or name not in QUICK)
    assert name not in QUICK or [bool(count) for count in joined] == [0 < rank < ranks - 1 for rank in range(ranks)]
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


# ---- both ends of a rank's rows


def with_neighbours(
    other_weight: bool = False, read_early: bool = False, read_twice: bool = False, fewer: bool = False,
    one_end: bool = False,
) -> fx.Graph:  # fmt: skip
    """A convolution of two samples' rows, the first and last of whose result are put right by what came."""
    graph = fx.Graph()
    x, weight, second, arriving = (graph.placeholder(name) for name in ("x", "weight", "second", "arriving"))
    made = graph.call_function(aten.conv2d.default, (x, weight, None, [1, 1], [1, 1]))
    extra, taken = [], 0
    for before in (True,) if one_end else (True, False):
        start = 0 if before else 3
        here = graph.call_function(aten.slice.Tensor, (x, 2, start, start + 2))
        zeros = 1 if fewer and not before else 0
        place = (arriving, here, 2, taken, 1, before, zeros, "")
        taken += 2 * 3 * 4
        rows = graph.call_function(ops.halo_finish.default, place)
        filters = second if other_weight and not before else weight
        right = graph.call_function(aten.conv2d.default, (rows, filters, None, [1, 1], [0, 1]))
        graph.call_function(ops.put_rows.default, (made, right, 2, 0 if before else 3 if fewer else 4))
        if before and read_early:
            extra.append(graph.call_function(aten.silu.default, (made,)))
        if before and read_twice:
            extra.append(graph.call_function(aten.relu.default, (rows,)))
    graph.output((graph.call_function(aten.relu.default, (made,)), *extra))
    return graph


def joined_edges(graph: fx.Graph) -> tuple[fx.GraphModule, Found, list[torch.Tensor]]:
    """The graph after the pass, what that says, and some inputs."""
    torch.manual_seed(0)
    given = [torch.randn(shape) for shape in ((2, 3, 5, 4), (6, 3, 3, 3), (6, 3, 3, 3), (2 * 2 * 3 * 4,))]
    yielded: dict[fx.Node, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            yielded[n] = super().run_node(n)
            return yielded[n]

    Recorder(fx.GraphModule({}, graph)).run(*given)
    found = join_edges.rewrite(graph, yielded, Chooser(join_edges.name))
    graph.lint()
    return fx.GraphModule({}, graph), found, given


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_both_ends_are_one_convolution(memory: torch.memory_format) -> None:
    module, found, (x, *rest) = joined_edges(with_neighbours())
    assert found.changed == 1 and not found.apart
    assert len(module.graph.find_nodes(op="call_function", target=aten.conv2d.default)) == 2
    x = x.to(memory_format=memory)
    (expected,) = fx.GraphModule({}, with_neighbours())(x, *rest)
    torch.testing.assert_close(module(x, *rest)[0], expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"other_weight": True}, edges.OTHER),
        ({"read_early": True}, edges.READ),
        ({"read_twice": True}, edges.ELSEWHERE),
        ({"fewer": True}, edges.SIZES),
        ({"one_end": True}, None),
    ],
)
def test_ends_stay_apart_where_they_are_not_alike(changes: dict[str, bool], reason: str | None) -> None:
    module, found, given = joined_edges(with_neighbours(**changes))
    assert not found.changed and list(found.apart) == ([reason] if reason else [])
    for one, like in zip(module(*given), fx.GraphModule({}, with_neighbours(**changes))(*given), strict=True):
        assert torch.equal(one, like)


def test_rows_that_come_lie_as_those_that_are_here() -> None:
    """So that a convolution reads them where they are."""
    here, arriving = torch.randn(2, 3, 2, 4).to(memory_format=torch.channels_last), torch.randn(2 * 3 * 4)
    one = ops.halo_finish(arriving, here, 2, 0, 1, True, 1, "")
    both = ops.halo_finish_both(arriving, here, here, 2, [0, 0], [1, 1], [1, 1], "")
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert both.is_contiguous(memory_format=torch.channels_last) and torch.equal(both[:2], one)
    with pytest.raises(ValueError, match="halo_finish_both along dim 2 of ends of"):
        ops.halo_finish_both(arriving, here, here, 2, [0, 0], [1, 1], [0, 1], "")


def test_a_compiler_waits_for_rows_behind_the_convolution_that_needs_none() -> None:
    """Left to itself inductor moves that convolution behind the wait, next to what is written to its result."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    rows = (2, [0], [5], [5], 0, "")
    arriving = graph.call_function(ops.halo_start.default, (x, *rows))
    made = graph.call_function(aten.conv2d.default, (x, weight, None, [1, 1], [1, 1]))
    here = graph.call_function(aten.slice.Tensor, (x, 2, 0, 3))
    came = graph.call_function(ops.halo_finish.default, (arriving, here, 2, 0, 0, True, 0, ""))
    right = graph.call_function(aten.conv2d.default, (came, weight, None, [1, 1], [0, 1]))
    graph.call_function(ops.put_rows.default, (made, right, 2, 0))
    graph.output((graph.call_function(aten.relu.default, (made,)),))
    module, given = fx.GraphModule({}, graph), [torch.randn(2, 3, 5, 4), torch.randn(6, 3, 3, 3)]
    pin_order()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, options=options_for(graph, {}))
        result, (code,) = run_and_get_code(compiled, *given)
        torch.testing.assert_close(result, module(*given))
    called = re.findall(r"= [a-z_.]*\.(halo_start|convolution|halo_finish)(?:\.default)?\(", code)
    assert called == ["halo_start", "convolution", "halo_finish", "convolution"]
