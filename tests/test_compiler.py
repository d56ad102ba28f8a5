"""The passes: their order, what they leave for people to read, and what is noticed of broken programs."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from splitting import captured
from torch import fx

from xdit_compile import Plan
from xdit_compile.backends.eager import Eager
from xdit_compile.compiler import PASSES, Call, Compilation, check, compiled, run_passes
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import BrokenProgramError, UsageError
from xdit_compile.ir.program import Input, Program
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.fuse import fusions
from xdit_compile.reports.dump import observers

NAMES = [each.name for each in PASSES]
LEFT_OUT = [*(each.name for each in fusions.IN_ORDER if each.kinds == ("cuda",)), "hide_exchanges"]
"""Passes for GPUs, and one for plans that name a link."""
PAGE = Path(__file__).resolve().parents[1] / "docs" / "passes.md"


def test_the_page_names_every_pass_in_order():
    assert re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE) == NAMES


@pytest.mark.parametrize(
    ("degrees", "programs", "skipped"),
    [
        ({"ulysses": 2}, {"call"}, {"split_step_invariant", "assign_stages", "tile_rows", *LEFT_OUT}),
        ({"distrifusion": 2}, {"waiting", "stale"}, {"split_step_invariant", "assign_stages", "tile_rows", *LEFT_OUT}),
        ({"pipefusion": 2}, {"full", "common", "patch_0", "patch_1"}, {"hoist_linears", "tile_rows", *LEFT_OUT}),
    ],
)
def test_every_pass_of_every_method_is_timed_and_dumped(degrees, programs, skipped, tmp_path):
    model, plan = captured("sd3"), Plan(**degrees)
    watching = observers("module", 1, str(tmp_path))
    call = Call(model.module, model.args, model.kwargs)
    state = run_passes(Compilation(plan, call), until="choose_units", observers=watching)
    state = compiled(state.analysis, plan, Mesh.simulated(plan, 1), backend=Eager(), observers=watching)
    ran = [name for name in NAMES if name not in skipped]
    assert [name for name, _ in state.seconds] == ran and all(seconds > 0 for _, seconds in state.seconds)
    assert set(state.programs) == set(state.runs) == programs
    files = {path.name for path in (tmp_path / "rank1").iterdir()}
    assert {file.split("_")[0] for file in files} == {str(NAMES.index(name) + 1) for name in ran}
    assert {f"{len(NAMES)}_compile_{name}_root.py" for name in programs} <= files


def test_passes_stop_where_they_are_told():
    model = captured("sd3")
    call = Call(model.module, model.args, model.kwargs, run=False)
    state = run_passes(Compilation(Plan(), call), until="infer_axes")
    assert state.inference is not None and state.units is None
    with pytest.raises(UsageError, match="pass 'inline' is unknown; choose one of capture, hoist_linears, infer_axes"):
        run_passes(state, until="inline")


def _no_metadata(program: Program) -> None:
    nodes = (node for structure in program.structures().values() for node in structure.graph.nodes)
    next(node for node in nodes if node.op == "call_function").meta.clear()


def _dead_structure(program: Program) -> None:
    some = next(iter(program.structures().values()))
    program.root.add_submodule("unused", fx.GraphModule(some, some.graph))


def _lost_argument(program: Program) -> None:
    call = program.calls()[0]
    call.args = call.args[:-1]


def _lost_result(program: Program) -> None:
    graph = program.root.graph
    item = next(node for node in graph.nodes if node.op == "call_function" and node.target is operator.getitem)
    item.args = (item.args[0], 99)


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (_no_metadata, "has no metadata"),
        (_dead_structure, "nothing calls unused"),
        (_lost_argument, "arguments"),
        (_lost_result, "takes result 99 of"),
    ],
)
def test_a_broken_graph_is_noticed(breaks: Callable[[Program], None], words: str):
    program = captured.__wrapped__("sd3").inference.program
    breaks(program)
    with pytest.raises(BrokenProgramError, match=words):
        check(Compilation(Plan(), program=program))


def test_a_placeholder_without_input_and_an_axis_that_does_not_fit_are_noticed():
    inference = captured("sd3").inference
    program = inference.program
    with pytest.raises(BrokenProgramError, match="has no input"):
        check(Compilation(Plan(), program=dataclasses.replace(program, inputs=program.inputs[:-1])))
    more = (*program.inputs, Input("lost", "user", 99))
    with pytest.raises(BrokenProgramError, match="input lost has no placeholder"):
        check(Compilation(Plan(), program=dataclasses.replace(program, inputs=more)))
    node, (axes, *_) = next(pair for pair in inference.axes.items() if len(pair[1][0]) > 1)
    wrong = Inference(program, {**inference.axes, node: [axes[1:]]}, inference.frames)
    with pytest.raises(BrokenProgramError, match=f"{node.name} is .* and its axes are of"):
        check(Compilation(Plan(), program=program, inference=wrong))
