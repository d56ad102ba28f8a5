"""Ulysses' exchanges while something else is computed: exact, in one order on all ranks, and only where it pays."""

from __future__ import annotations

import datetime
import functools
import re
import time
from collections.abc import Iterator
from unittest import mock

import diffusers
import procs
import pytest
import torch
import torch.distributed as dist
from splitting import CASES, Captured, partition_all, partition_rows, run_split, worst_difference
from torch import fx, nn
from torch._inductor.graph import GraphLowering

import xdit_compile
from xdit_compile.backends import artifact
from xdit_compile.backends.forms import Forms, contiguous, form_of
from xdit_compile.backends.inductor import OPTIONS
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Program
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.fuse import join_linears
from xdit_compile.passes.local.ledger import Ledger
from xdit_compile.passes.local.local_graph import LocalGraph
from xdit_compile.passes.lowering.hidden_exchange import LATENCY_S, Hiding, choose
from xdit_compile.passes.lowering.ulysses import HeadExchange
from xdit_compile.passes.memory.on_meta import shapes_of
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

aten, ops = torch.ops.aten, torch.ops.xdit_compile
SLOW = "1B/s"
"""A link over which everything is worth hiding."""
START, AT_ONCE, FINISH = (getattr(ops, f"all_to_all{name}").default for name in ("_start", "", "_finish"))


def flux(heads: int) -> nn.Module:
    """Two kinds of blocks: of two streams, and of one with a feed-forward beside its attention."""
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=12, num_layers=1, num_single_layers=2, attention_head_dim=18, num_attention_heads=heads,
        joint_attention_dim=28, pooled_projection_dim=22, guidance_embeds=True, axes_dims_rope=(4, 6, 8),
    ).eval()  # fmt: skip


@functools.cache
def captured_flux(heads: int) -> Captured:
    module, (args, kwargs) = flux(heads), CASES["flux"].inputs()
    with torch.no_grad():
        expected = list(module(*args, **kwargs))
    return Captured(module, args, kwargs, expected, infer(capture(module, args, kwargs), rulebook()))


def programs(model: Captured, plan: Plan) -> list[Program]:
    """What every rank compiles."""
    meshes = (Mesh.simulated(plan, rank) for rank in range(plan.world_size))
    states = [compiled(model.analysis(plan), plan, mesh, until="hide_exchanges") for mesh in meshes]
    return [state.programs["call"] for state in states]


def called(program: Program) -> Iterator[list[fx.Node]]:
    """The operators of each structure."""
    for structure in program.structures().values():
        yield [node for node in structure.graph.nodes if node.op == "call_function"]


def text(program: Program) -> list[str]:
    return [str(each.graph) for each in (program.root, *program.structures().values())]


@pytest.mark.parametrize(("ranks", "heads", "halves"), [(2, 6, 2), (3, 6, 2), (8, 8, 0)])
def test_it_is_exact_and_ranks_meet_in_one_order(ranks: int, heads: int, halves: int) -> None:
    """Of 90 tokens ranks have different numbers; with one head on each there are no halves."""
    model, plan = captured_flux(heads), Plan(ulysses=ranks, link=SLOW)
    made = programs(model, plan)
    for program in made:
        starts = sum(node.target is START for nodes in called(program) for node in nodes)
        assert starts == sum(1 + halves for nodes in called(program) if any(node.target is START for node in nodes))
        assert starts >= 2 * (1 + halves), "both kinds of blocks"
    results = run_simulated(made, model.module, model.args, model.kwargs)
    assert max(worst_difference(result, model.expected) for result in results) <= 2e-5
    assert run_split(model, plan)[0] <= 2e-5, "in the order of the module as well"


def test_values_leave_first_and_ends_come_last() -> None:
    (program, _), seen = programs(captured_flux(6), Plan(ulysses=2, link=SLOW)), 0
    for nodes in called(program):
        targets = [node.target for node in nodes]
        if START not in targets:
            continue
        seen += 1
        values, first, second = (at for at, target in enumerate(targets) if target is START)
        heads = targets.index(AT_ONCE)
        assert aten.linear.default in targets[values:heads], "queries and keys are computed behind values"
        assert targets[first:second].count(ops.attention.default) == 1
        ends = [at for at, target in enumerate(targets) if target is FINISH]
        assert ends[0] > heads and ends[1] > second
        for end in ends:
            between = targets[end + 1 : nodes.index(min(nodes[end].users, key=nodes.index))]
            assert set(between) <= {FINISH}, "whoever reads comes at once"
    assert seen >= 2, "both kinds of blocks"


def test_nothing_changes_without_a_link_or_with_the_pass_left_out() -> None:
    model = captured_flux(6)
    (plain, _), (hidden, _) = programs(model, Plan(ulysses=2)), programs(model, Plan(ulysses=2, link=SLOW))
    left_out, _ = programs(model, Plan(ulysses=2, link=SLOW, without=("hide_exchanges",)))
    assert text(plain) == text(left_out) != text(hidden)
    assert not any(node.target in (START, FINISH) for nodes in called(plain) for node in nodes)


class Attention(nn.Module):
    """One attention between projections."""

    def __init__(self, width: int):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, 8)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@functools.cache
def attention() -> Captured:
    """Four heads of 8 channels over 16 tokens."""
    torch.manual_seed(0)
    module, args = Attention(32), (torch.randn(1, 16, 32),)
    with torch.no_grad():
        return Captured(module, args, {}, [module(*args)], infer(capture(module, args, {}), rulebook()))


def test_queries_and_keys_are_joined_and_values_are_told_to_stay_apart() -> None:
    (rank, _) = partition_all(attention().inference, Plan(ulysses=2, link=SLOW))
    said = join_linears.told(rank.program)
    assert said.startswith("join_linears: 3 products in place of 4"), said
    assert f"1 apart, as {join_linears.EARLY}" in said


def test_bytes_that_nothing_hides_are_those_of_queries_keys_and_the_second_half() -> None:
    """Of 16 tokens with 4 heads of 8 floats a rank sends half of its 8 in a quarter of what all ranks exchange."""
    quarter = 16 * 32 // 4 * 4
    module = attention().module
    found = xdit_compile.explain(module, Plan(ulysses=2, link=SLOW), args=attention().args)
    counted = {(item.op, item.count): (item.bytes, item.exposed) for item in found.collectives}
    assert counted["all_to_all", 1] == (2 * quarter, 2 * quarter), "queries and keys"
    assert counted["all_to_all_start", 3] == (2 * quarter, quarter // 2), "values, and a result in halves"
    gathered = next(item.exposed for item in found.collectives if item.op == "all_gather")
    assert f"{2 * quarter + quarter // 2 + gathered:,} bytes that nothing hides" in " ".join(str(found).split())
    assert "hide_exchanges: 3 all-to-alls begun ahead" in str(found)
    plain = xdit_compile.explain(module, Plan(ulysses=2), args=attention().args)
    assert all(item.exposed == item.bytes for item in plain.collectives) and "hide_exchanges" not in str(plain)
    fast = xdit_compile.explain(module, Plan(ulysses=2, link="450GB/s"), args=attention().args)
    assert fast.collectives == plain.collectives and "hide_exchanges: no exchange is hidden" in str(fast)
    ring = xdit_compile.explain(module, Plan(ring=2), args=attention().args)
    assert [item.exposed for item in ring.collectives if item.op == "ring_attention"] == [0]


def test_rows_of_a_convolution_are_hidden_where_it_does_not_wait_for_them() -> None:
    module, args = nn.Conv2d(3, 4, 3, padding=1).eval(), (torch.randn(1, 3, 8, 6),)
    inference = infer(capture(module, args, {}), rulebook())
    plans = {True: Plan(ring=2), False: Plan(ring=2, vae="patch", vae_memory="1GiB")}
    for hides, plan in plans.items():
        items = [item for item in partition_rows(inference, plan)[0].ledger.collectives if item.purpose == "halo"]
        assert [item.exposed for item in items] == [0 if hides else 3 * 6 * 4]


def exchange(index: int, lengths: tuple[int, ...], heads: int = 8, keys: int = 8) -> HeadExchange:
    """On paper: one of some ranks, with 10 channels of 2 bytes."""
    local, dtype = mock.create_autospec(LocalGraph), torch.bfloat16
    return HeadExchange(local, Ledger(), "group", index, dtype, [1], heads, keys, 10, 10, lengths, lengths)


def test_what_is_hidden_takes_longer_than_one_more_exchange() -> None:
    values = 40 * 4 * 10 * 2
    """Bytes of the values that leave the rank with most tokens."""
    first = 40 * 2 * 10 * 2
    """Of half of the heads of a result that leave the rank with fewest."""
    for index in range(2):
        here = exchange(index, (40, 39))
        assert choose(here, None) is None
        assert choose(here, 1.01 * values / LATENCY_S) is None
        assert choose(here, 0.99 * values / LATENCY_S) == Hiding(True, None)
        assert choose(here, 0.99 * first / LATENCY_S) == Hiding(True, (2, 2))
    assert choose(exchange(0, (40, 39), heads=5, keys=5), 1.0) is None, "ranks have different numbers of heads"
    assert choose(exchange(0, (40,)), 1.0) is None
    assert choose(exchange(0, (40, 39), heads=12, keys=6), 1.0) == Hiding(True, (4, 2)), "whole groups"
    assert choose(exchange(0, (40, 39), heads=6, keys=2), 1.0) == Hiding(True, (2, 1)), "one group is taken apart"


def generated(structure: fx.GraphModule, forms: Forms) -> list[str]:
    """What the code that inductor makes of a structure calls."""
    sources: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", sources.append):
        artifact.compiled(structure, forms, {**OPTIONS, "force_disable_caches": True}, None)
    (source,) = sources
    body = source[source.index("def call") :]
    return re.findall(r"(?:extern_kernels|torch\.ops\.xdit_compile)\.(\w+?)(?:\.default)?\(", body)


@pytest.mark.slow
def test_inductor_keeps_the_order() -> None:
    program, _ = programs(attention(), Plan(ulysses=2, link=SLOW))
    (structure,) = (each for each in program.structures().values() if each.graph.find_nodes(
        op="call_function", target=START
    ))  # fmt: skip
    inputs = structure.graph.find_nodes(op="placeholder")
    (call,) = (call for call in program.calls() if program.root.get_submodule(str(call.target)) is structure)
    shapes, cpu = shapes_of(program), torch.device("cpu")
    assert len(call.args) == len(inputs)
    forms = tuple(contiguous(tuple(shapes[node].shape), shapes[node].dtype, cpu) for node in inputs)
    names = [name for name in generated(structure, forms) if name != "all_gather"]
    assert names == [
        "addmm", "all_to_all_start", "addmm", "all_to_all", "all_to_all_settle", "attention", "all_to_all_start",
        "attention", "all_to_all_start", "all_to_all_settle", "all_to_all_settle", "addmm",
    ]  # fmt: skip


@pytest.mark.slow
def test_inductor_keeps_the_order_where_another_takes_less_memory() -> None:
    """Queries need much memory for a moment: computed before the values are there, they would lower the peak."""
    graph = fx.Graph()
    x, values, queries = map(graph.placeholder, ("x", "values", "queries"))

    def call(target: object, *args: object) -> fx.Node:
        return graph.call_function(target, args)

    sent = call(aten.reshape.default, call(aten.sin.default, call(aten.mm.default, x, values)), [-1])
    begun = call(START, sent, [600], [600], "")
    sums = call(aten.sum.dim_IntList, call(aten.tanh.default, call(aten.mm.default, x, queries)), [1])
    other = call(AT_ONCE, sums, [6], [6], "")
    ended = call(aten.reshape.default, call(FINISH, begun, sent, ""), [6, 100])
    graph.output((call(aten.mul.Tensor, ended, call(aten.reshape.default, other, [6, 1])),))
    forms = tuple(form_of(torch.empty(shape)) for shape in ((6, 5), (5, 100), (5, 2000)))
    order = ["mm", "all_to_all_start", "mm", "all_to_all", "all_to_all_settle"]
    assert generated(fx.GraphModule({}, graph), forms) == order


def several_calls(rank: int, backend: str) -> float:
    """The greatest difference of calls with different inputs from the unsplit module's, of its greatest value."""
    module, (args, kwargs) = flux(6), CASES["flux"].inputs()
    calls = [{**kwargs, "hidden_states": kwargs["hidden_states"] * scale} for scale in (1, -2, 0.3, 1)]
    with torch.no_grad():
        expected = [list(module(*args, **each)) for each in calls]
        xdit_compile.parallelize(module, Plan(ulysses=2, link=SLOW, backend=backend))
        return max(worst_difference(module(*args, **each), one) for each, one in zip(calls, expected, strict=True))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_real_processes_give_what_one_gives(backend: str) -> None:
    assert max(procs.run(several_calls, 2, backend, timeout=400)) <= 2e-5


class EndsAfterASlice:
    """A collective that ends between the end of a wait's limit and the look whether it has ended."""

    def __init__(self, work: dist.Work):
        self._work = work

    def wait(self, *limit: datetime.timedelta) -> None:
        try:
            self._work.wait(*limit)
        except RuntimeError:
            while not self._work.is_completed():
                time.sleep(0.01)
            raise

    def is_completed(self) -> bool:
        return self._work.is_completed()


def late(rank: int) -> bool:
    """Whether what a peer sends late is there when it is read, and not before."""
    group = procs.connected(Plan(ulysses=2), 60).group("ulysses")
    x, begin = torch.full((4,), float(rank)), dist.all_to_all_single
    time.sleep(1.2 * rank)
    slow = mock.patch.object(dist, "all_to_all_single", lambda *args, **how: EndsAfterASlice(begin(*args, **how)))
    with slow:
        arriving = START(x, [2, 2], [2, 2], group)
    return FINISH(arriving, x, group).tolist() == [0, 0, 1, 1]


def test_an_end_waits_for_a_late_peer() -> None:
    assert procs.run(late, 2) == [True, True]
