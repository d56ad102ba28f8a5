"""Norms at the begin of a block are computed where the block before makes what they read, and in no other case."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from splitting import CASES, Captured, captured, worst_difference
from torch import nn
from torch.nn import functional as F

from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import Analysis, compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.arguments import sequence_of
from xdit_compile.ir.program import Program
from xdit_compile.ir.verify_program import verify_program
from xdit_compile.passes.across import join_norms as joining
from xdit_compile.passes.across.join_norms import join_norms, told
from xdit_compile.passes.across.joined_slices import join_slices
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.fuse.fusions import JOIN_NORMS
from xdit_compile.passes.fuse.hoist_linears import hoist_linears
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

aten = torch.ops.aten
TOLERANCE = 2e-5
DEGREES: tuple[dict[str, Any], ...] = ({}, {"ulysses": 2}, {"ring": 2, "tensor": 2}, {"cfg": 2})
QUICK = ("sd3",)
WIDTH = 16


def programs(model: Captured, plan: Plan, name: str = "call") -> list[Program]:
    """What every rank has before the pass."""
    program = hoist_linears(model.inference.program) if plan.patch_count == 1 else model.inference.program
    inference = infer(program, rulebook())
    analysis = Analysis(program, inference, choose_units(inference, plan))
    ranks = [Mesh.simulated(plan, rank) for rank in range(plan.world_size)]
    return [compiled(analysis, plan, mesh, until="join_linears").programs[name] for mesh in ranks]


def assert_exact(model: Captured, ranks: list[Program]) -> list[Program]:
    """Have the pass change programs, and compare what they compute with the module."""
    joined = [join_norms(program) for program in ranks]
    for program in joined:
        verify_program(program, "call", metadata=False)
    results = run_simulated(joined, model.module, model.args, model.kwargs)
    assert max(worst_difference(result, model.expected) for result in results) <= TOLERANCE
    return joined


def norms(program: Program) -> list[list[bool]]:
    """Of the norms of each call, in order, whether one makes a result that leaves it."""
    found = []
    for call in program.calls():
        graph = program.structures()[str(call.target)].graph
        leaving = set(sequence_of(graph.output_node().args[0]))
        nodes = graph.find_nodes(op="call_function", target=aten.layer_norm.default)
        found.append([bool(leaving & _behind(node)) for node in nodes])
    return found


def _behind(node: torch.fx.Node) -> set[torch.fx.Node]:
    """What arithmetic makes of a value, up to products."""
    nodes = {node}
    for user in node.users:
        nodes |= _behind(user) if user.target in (aten.mul.Tensor, aten.add.Tensor) else set()
    return nodes


class Block(nn.Module):
    """Modulation and products of a norm (kind ``n``), of a sine (``s``), added to the hidden states; of a norm, and not
    added (``p``)."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.table = nn.Parameter(torch.randn(2, WIDTH) / 4)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.sin() if self.kind == "s" else F.layer_norm(x, (WIDTH,))
        y = y * (1 + self.table[0]) + self.table[1]
        y = self.linear(torch.tanh(self.linear(y)))
        return y if self.kind == "p" else x + y


class Stack(nn.Module):
    """Blocks, a norm and a product; with ``skips`` the first block's result is added once more behind the last."""

    def __init__(self, kinds: str, skips: bool):
        super().__init__()
        self.skips = skips
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(map(Block, kinds))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        results = []
        for block in self.blocks:
            x = block(x)
            results.append(x)
        y: torch.Tensor = self.last(F.layer_norm(x, (WIDTH,)))
        return y + results[0] if self.skips else y


@functools.lru_cache
def stack(kinds: str, skips: bool = False) -> Captured:
    """Such a module, and a call of it."""
    torch.manual_seed(0)
    module, x = Stack(kinds, skips).eval(), torch.randn(2, 6, WIDTH)
    with torch.no_grad():
        expected = [module(x)]
    return Captured(module, (x,), {}, expected, infer(capture(module, (x,), {}), rulebook()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(CASES)]
)
def test_the_same_is_computed_under_every_split(name: str) -> None:
    model = captured(name)
    for degrees in DEGREES:
        assert_exact(model, programs(model, Plan(**degrees)))


def test_every_norm_between_blocks_is_at_the_end_of_one() -> None:
    """Of four blocks three are one structure, and one more is the last: the norm before the last product follows it."""
    model = stack("nnnn")
    (program,) = programs(model, Plan())
    assert norms(program) == [[], [False], [False], [False], [False], [False]]
    (joined,) = assert_exact(model, [program])
    assert norms(joined) == [[True], [True], [True], [True], [True], []]
    names = [str(call.target) for call in joined.calls()]
    assert names[1] == names[2] == names[3] != names[4] and len(joined.structures()) == 4
    assert told(program) == ("join_norms: 4 norms in the kernel that makes what they read, 4 structures, 3 before")


def test_both_streams_of_a_block_are_taken() -> None:
    model = captured("sd3")
    (program,) = programs(model, Plan())
    (joined,) = assert_exact(model, [program])
    blocks = [call for call in joined.calls() if call.meta.get("repeated")]
    results = [len(sequence_of(joined.structures()[str(call.target)].graph.output_node().args[0])) for call in blocks]
    assert results[0] == 4, "hidden states of both, and what is made of each"


def test_a_result_that_others_read_stays_a_result() -> None:
    model = stack("nnn", skips=True)
    (joined,) = assert_exact(model, programs(model, Plan()))
    assert norms(joined)[1] == [False, True]


def test_the_first_of_a_kind_is_computed_behind_another_kind() -> None:
    """Of the blocks without norm the last one alone computes a norm, and is a structure of its own."""
    model = stack("ssnn")
    (joined,) = assert_exact(model, programs(model, Plan()))
    assert norms(joined) == [[], [], [True], [True], [True], []]
    assert len({str(call.target) for call in joined.calls()}) == 6


def test_rows_are_laid_out_in_one_piece_where_norms_read_them() -> None:
    """Tokens come of a convolution, whose channels lie apart."""
    model = captured("pixart")
    (joined,) = assert_exact(model, programs(model, Plan()))
    first = joined.structures()[str(joined.calls()[0].target)]
    (clone,) = first.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert clone in sequence_of(first.graph.output_node().args[0])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: stack("ppp"), "4 apart, as no arithmetic makes what it reads"),
        (lambda: stack("sss"), f"1 apart, as {joining.STRUCTURES}"),
    ],
)
def test_norms_stay_where_nothing_is_saved(model: Callable[[], Captured], reason: str) -> None:
    """Behind a product no kernel could compute it; of three equal blocks one would be another for one launch."""
    (program,) = programs(model(), Plan())
    assert join_norms(program) is program
    assert told(program).endswith(reason)


@pytest.mark.parametrize(
    ("degrees", "names"),
    [({"distrifusion": 2}, ("waiting", "stale")), ({"pipefusion": 2}, ("full", "patch_0", "patch_1"))],
)
def test_programs_of_states_and_patches_stay_as_they_are(degrees: dict[str, Any], names: tuple[str, ...]) -> None:
    model = captured("sd3")
    for name in names:
        for program in programs(model, Plan(**degrees), name):
            assert join_norms(program) is program
            assert told(program) == f"join_norms: left out, as {joining.STATE}"


def test_it_is_for_gpus_and_can_be_left_out() -> None:
    assert JOIN_NORMS.wanted((), torch.device("cuda"))
    assert not JOIN_NORMS.wanted((), torch.device("cpu"))
    assert not JOIN_NORMS.wanted(("join_norms",), torch.device("cuda"))


def test_what_is_cut_and_put_together_is_taken_as_it_is() -> None:
    """Halves that change places, as those of a sinusoid, are joined once; slices of all of a value are that value."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.sin.default, (x,))
    halves = graph.call_function(aten.cat.default, ([y, graph.call_function(aten.cos.default, (x,))], -1))
    ends = [graph.call_function(aten.slice.Tensor, (halves, 1, *where)) for where in ((4, 8), (0, 4))]
    turned = graph.call_function(aten.cat.default, (ends, -1))
    cut = [graph.call_function(aten.slice.Tensor, (y, 0, *where)) for where in ((0, 1), (1, 2**40))]
    graph.output((turned, graph.call_function(aten.cat.default, (cut,))))
    module, value = torch.fx.GraphModule({}, graph), torch.randn(3, 4)
    expected, shapes = module(value), {x: value, y: value}
    shapes |= {node: torch.empty(3, 4) for node in graph.find_nodes(op="call_function", target=aten.cos.default)}
    join_slices(graph, shapes)
    module.recompile()
    assert len(graph.find_nodes(op="call_function", target=aten.cat.default)) == 1
    assert not graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    assert all(torch.equal(one, other) for one, other in zip(module(value), expected, strict=True))


def test_a_part_that_is_not_all_is_still_cut() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(aten.sin.default, (x,))
    cut = [graph.call_function(aten.slice.Tensor, (y, 0, *where)) for where in ((1, 2), (2, 3))]
    graph.output((graph.call_function(aten.cat.default, (cut,)),))
    join_slices(graph, {x: torch.empty(3, 4), y: torch.empty(3, 4)})
    assert len(graph.find_nodes(op="call_function", target=aten.slice.Tensor)) == 2
