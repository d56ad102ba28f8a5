"""What optional passes choose by: timings of the device where there are some, else what places move and launch."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from splitting import captured
from torch import fx, nn
from torch.utils import _pytree as pytree

from tests.fuse.test_fusions import GPU, OPS, Layers, calls, even, fused_of
from xdit_compile import Plan, explain, parallelize
from xdit_compile.backends.eager import Eager
from xdit_compile.capture.capture import capture
from xdit_compile.compiler import compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Program
from xdit_compile.passes.fuse import fusions
from xdit_compile.passes.fuse.fusions import FOLD_ACTIVATIONS, IN_ORDER, JOIN_LINEARS, OptionalPass
from xdit_compile.passes.fuse.selection import MORE, UNTIMED, Chooser, Cost, Noting, Site, Small
from xdit_compile.passes.fuse.timings import Timing, Timings, described, file_of, keep, load
from xdit_compile.runtime.verify.simulated_mesh import run_simulated
from xdit_compile.runtime.verify.timed import timed

aten = torch.ops.aten
CPU = torch.device("cpu")
TOLERANCE = 2e-5


def sites(fusion: OptionalPass, program: Program) -> dict[str, Small]:
    """What a pass could change, by key."""
    noting = Noting(fusion.name)
    fusion.run(program, noting)
    return {key: small for key, (small, _) in noting.seen.items()}


def slower(small: Small, name: str = "join_linears", ratio: float = 1.08) -> Timing:
    return Timing(name, str(small), 1e-3, ratio * 1e-3, 0.0, 5, "2026-01-01")


def line_of(program: Program, table: Timings) -> str:
    """What is said of joined linears."""
    return next(line for line in fusions.told(program, (), CPU, table) if line.startswith("join_linears"))


def unfused(name: str, plan: Plan) -> Program:
    model, mesh = captured(name), Mesh.simulated(plan, 0)
    return compiled(model.analysis(plan), plan, mesh, until="hoist_positions", device=CPU).programs["call"]


def assert_exact(programs: list[Program], model: Any) -> None:
    for result in run_simulated(programs, model.module, model.args, model.kwargs):
        for one, like in zip(pytree.tree_leaves(result), model.expected, strict=True):
            assert (one - like).abs().max() <= TOLERANCE * like.abs().max()


def about() -> dict[str, Any]:
    """This device as it is now: other tests change the number of threads."""
    return described(CPU, "eager", "default")


# ---- measuring


@pytest.mark.parametrize("name", ["flux", "cogvideox_rotary", "even"])
def test_every_place_is_timed_by_itself(name: str) -> None:
    """As a graph of its own it is rewritten as where it was found, and both agree."""
    plan = Plan(ulysses=2) if name == "even" else Plan()
    model = even() if name == "even" else captured(name)
    state = compiled(model.analysis(plan), plan, Mesh.simulated(plan, 0), until="hoist_positions", device=CPU)
    program, tried = state.programs["call"], set()
    for fusion in IN_ORDER:
        for small in sites(fusion, program).values():
            timing = timed(small, fusion, program, Eager(), CPU, rounds=3)
            assert timing is not None and not timing.wrong, (fusion.name, str(small), timing)
            assert timing.apart and timing.fused and timing.error is not None and timing.error <= TOLERANCE
            tried.add(fusion.name)
        program = fusion.run(program, fusion.chooser(Timings()))
    not_here = {"spread_norms", "late_biases", "join_edges", "join_norms", *(["pack_heads"] if name != "even" else [])}
    assert tried == {each.name for each in IN_ORDER} - not_here, "of pictures, and what moves nodes between structures"


def test_half_precision_is_compared_with_float64() -> None:
    module = Layers(lambda m, x: m.same(torch.nn.functional.gelu(m.wide(x), approximate="tanh")))
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    program = capture(module.bfloat16(), (x,), {})
    (small,) = sites(FOLD_ACTIVATIONS, program).values()
    timing = timed(small, FOLD_ACTIVATIONS, program, Eager(), CPU, rounds=3)
    assert timing is not None and not timing.wrong and 0 < (timing.error or 0) < 2**-6


def halved(program: Program, chooser: Chooser) -> Program:
    """A pass that joins linears and gets the last result wrong."""
    program = JOIN_LINEARS.run(program, chooser)
    for structure in program.structures().values():
        for node in structure.graph.find_nodes(op="call_function", target=aten.linear.default):
            with structure.graph.inserting_after(node):
                wrong = structure.graph.call_function(aten.mul.Tensor, (node, 0.5))
            node.replace_all_uses_with(wrong, delete_user_cb=lambda user, wrong=wrong: user is not wrong)
    return program


def refused(program: Program, chooser: Chooser) -> Program:
    """A pass whose code this device does not run."""
    program = JOIN_LINEARS.run(program, chooser)
    for structure in program.structures().values():
        for node in structure.graph.find_nodes(op="call_function", target=aten.linear.default):
            node.args = (*node.args[:1], *node.args[2:], node.args[1])
    return program


@pytest.mark.parametrize(("run", "said"), [(halved, "of the greatest value off"), (refused, "it failed, ")])
def test_what_is_wrong_is_recorded_and_never_taken(run: Any, said: str) -> None:
    program = unfused("flux", Plan())
    key, small = next(iter(sites(JOIN_LINEARS, program).items()))
    timing = timed(small, dataclasses.replace(JOIN_LINEARS, run=run), program, Eager(), CPU, rounds=3)
    assert timing is not None and said in timing.wrong and timing.fused is None
    told = line_of(program, Timings({key: timing}))
    assert f"apart, as fused it was tried and is not used: {timing.wrong}" in told


# ---- choosing


def test_what_was_slower_stays_apart_and_what_was_not_is_taken() -> None:
    plan, model = Plan(), captured("flux")
    program = unfused("flux", plan)
    found = sites(JOIN_LINEARS, program)
    (one, small), (two, other) = list(found.items())[:2]
    table = Timings({one: slower(small), two: slower(other, ratio=1.01)})
    told = line_of(program, table)
    assert "apart, as fused it timed 1.08 of apart" in told and " by timing" in told and " by estimate" in told
    assert "1.01" not in told, "that is noise"
    after, all_of_them = (
        compiled(model.analysis(plan), plan, Mesh.simulated(plan, 0), until="join_linears", device=CPU, timings=timings)
        for timings in (table, Timings())
    )
    joined = [[spec.name for spec in state.programs["call"].inputs if spec.members] for state in (after, all_of_them)]
    assert 0 < len(joined[0]) < len(joined[1])
    assert_exact([after.programs["call"]], model)


def test_what_moves_more_and_launches_as_much_stays_apart() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(aten.neg.default, (x,))
    graph.output((made,))
    shapes = {x: torch.empty(4, device="meta"), made: torch.empty(4, device="meta")}
    for fused, reason in (
        (Cost(33, 2), MORE), (Cost(32, 2), MORE), (Cost(31, 2), None), (Cost(33, 1), None), (Cost(31, 3), None)
    ):  # fmt: skip
        site = Site((x,), (made,), Cost(32, 2), fused)
        assert Chooser("a_pass").choose(site, shapes) == (reason, "estimate")
        assert Chooser("a_pass", needs_timing=True).choose(site, shapes).reason == UNTIMED
        key = site.small(shapes).key("a_pass")
        assert key is not None
        table = Timings({key: slower(site.small(shapes), "a_pass", 0.9)})
        assert Chooser("a_pass", table, needs_timing=True).choose(site, shapes) == (None, "timing")
        assert Chooser("another", table, needs_timing=True).choose(site, shapes).reason == UNTIMED


def test_ranks_may_choose_differently() -> None:
    """What is fused stays on its rank: collectives are the same, so one rank can fuse all and another nothing."""
    model, plan = even(), Plan(ulysses=2)
    bare = dataclasses.replace(plan, without=tuple(each.name for each in IN_ORDER))
    programs = [fused_of(model, plan, 0).programs["call"], fused_of(model, bare, 1, GPU).programs["call"]]
    packed = [any(args[10] for args in calls(each, OPS.norm_rope.default)) for each in programs]
    assert packed == [True, False]
    assert_exact(programs, model)


# ---- the table


def test_a_table_is_kept_and_grows(tmp_path: Path) -> None:
    small = next(iter(sites(JOIN_LINEARS, unfused("flux", Plan())).values()))
    first, second = "a" * 64, "b" * 64
    keep(tmp_path, about(), {first: slower(small)})
    keep(
        tmp_path, about(), {second: dataclasses.replace(slower(small), wrong="off", fused=None, apart=None, error=None)}
    )
    table = load(tmp_path, about())
    assert set(table.entries) == {first, second} and table.entries[first] == slower(small)
    assert load(tmp_path, {**about(), "threads": 99}).entries == {}
    again = table.with_others({first: slower(small, ratio=1.5)})
    assert again.digest == table.digest, "the same is decided"
    assert table.with_others({first: slower(small, ratio=0.5)}).digest != table.digest != Timings().digest


@pytest.mark.parametrize(
    "change",
    [
        lambda content: "{",
        lambda content: [],
        lambda content: {**content, "format": 99},
        lambda content: {**content, "about": {**content["about"], "name": "another"}},
        lambda content: {**content, "entries": {"../x": content["entries"]["a" * 64]}},
        lambda content: {**content, "entries": {"a" * 64: {**content["entries"]["a" * 64], "fused": -1.0}}},
        lambda content: {**content, "entries": {"a" * 64: {**content["entries"]["a" * 64], "more": 1}}},
        lambda content: {**content, "entries": {"a" * 64: 7}},
        lambda content: {**content, "entries": None},
    ],
)
def test_a_broken_table_is_one_line_and_not_used(change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keep(tmp_path, about(), {"a" * 64: Timing("join_linears", "a place", 1.0, 1.0, 0.0, 5, "2026-01-01")})
    path = file_of(tmp_path, about())
    broken = change(json.loads(path.read_text()))
    path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
    with caplog.at_level(logging.WARNING, "xdit_compile"):
        assert load(tmp_path, about()) == Timings()
    (record,) = caplog.records
    assert f"the table of timings {path} is not used: " in record.getMessage() and "\n" not in record.getMessage()


class Two(nn.Module):
    """Two linears of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.one(x), self.other(x)], -1)


def test_calls_are_made_anew_with_another_table(tmp_path: Path) -> None:
    x = torch.randn(2, 4)

    def ready() -> tuple[str, bool]:
        """Where the program of a call came from, and whether both linears are one."""
        module = Two()
        with torch.no_grad():
            expected = module(x)
            parallelize(module, Plan(backend="eager", cache=tmp_path))
            torch.testing.assert_close(module(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
        summary: Any = explain(module)
        told = [line for line in summary.fused if "apart, as fused it timed 1.08 of apart" in line]
        assert bool(told) == bool(load(tmp_path, about()).entries)
        return summary.ready, module.other.weight.storage_offset() > 0

    (said, joined), (again, still) = ready(), ready()
    assert "captured anew" in said and "from the cache" in again and joined and still
    program = capture(Two(), (x,), {})
    ((key, small),) = sites(JOIN_LINEARS, program).items()
    keep(tmp_path, about(), {key: slower(small)})
    (said, joined), (again, still) = ready(), ready()
    assert "captured anew" in said and "from the cache" in again and not joined and not still
