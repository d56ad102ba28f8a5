"""Programs as plain data: what is read again is what was written, computes the same, and nothing is pickled."""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import METHODS, partition_rows, program_text
from splitting import captured
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from zoo.autoencoders import AUTOENCODERS

from tests.capture.test_containers import Keeps, Takes, caches, inputs
from tests.ir.test_results import RESULTS, Output, Pair, plain
from xdit_compile.cache.graphs import Absent, canonical
from xdit_compile.cache.programs import packed, program_from_plain, program_to_plain, unpacked
from xdit_compile.cache.unportable import Unportable
from xdit_compile.capture.capture import capture
from xdit_compile.capture.interpret import run_outcome, run_program
from xdit_compile.compiler import check, compiled
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.kept_modules import KeptModule
from xdit_compile.ir.program import Program
from xdit_compile.ir.results import Template, tensors_of
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan
from xdit_compile.runtime.verify.simulated_mesh import run_ranks, run_simulated

ROOT = Path(__file__).resolve().parents[2]
SPLIT = ("ulysses 2", "tensor 2", "cfg 2")
KEEPING = ("pipefusion 2", "distrifusion 2")
GRID = torch.arange(12.0).reshape(3, 4)


MODELS = ("flux", "pixart", "sd3", "cogvideox", pytest.param("wan_t2v", marks=pytest.mark.slow))


def again(program: Program, **options: Any) -> Program:
    """A program written and read."""
    return program_from_plain(*unpacked(packed(*program_to_plain(program))), **options)


def assert_alike(one: Program, other: Program) -> None:
    assert program_text(one) == program_text(other)
    assert (one.inputs, one.in_spec, one.how) == (other.inputs, other.in_spec, other.how)
    assert without_addresses(one.outcome) == without_addresses(other.outcome)
    for kept, known in ((one.constants, other.constants), (guards(one), guards(other))):
        torch.testing.assert_close(kept, known, rtol=0, atol=0)
    structures = one.structures().items(), other.structures().items()
    for (name, structure), (same_name, same) in zip(*structures, strict=True):
        assert name == same_name and str(structure.graph) == str(same.graph)
        assert canonical(structure) == canonical(same)
    for node, same_node in zip(one.root.graph.nodes, other.root.graph.nodes, strict=True):
        assert (node.name, metadata(node)) == (same_node.name, metadata(same_node))


def without_addresses(value: Any) -> str:
    return re.sub(r" at 0x\w+", "", repr(value))


def guards(program: Program) -> dict[int, torch.Tensor]:
    return {guard.position: guard.value for guard in program.guards}


def metadata(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    layout = [(each.shape, each.stride(), each.dtype) for each in pytree.tree_leaves(value) if each is not None]
    return [layout, *(node.meta.get(key) for key in ("path", "repeated", "captured", "shape"))]


def of_rank(name: str, method: str, rank: int) -> dict[str, Program]:
    """The programs of one rank, by name."""
    model, plan = captured(name), Plan(**METHODS[method])
    return compiled(model.analysis(plan), plan, Mesh.simulated(plan, rank), until="assign_stages").programs


def of_ranks(name: str, method: str) -> list[dict[str, Program]]:
    return [of_rank(name, method, rank) for rank in (0, 1)]


@pytest.mark.parametrize("name", MODELS)
def test_programs_of_all_methods_come_back(name: str) -> None:
    assert_alike(captured(name).inference.program, again(captured(name).inference.program))
    for method in (*SPLIT, *KEEPING):
        programs = of_rank(name, method, 1)
        expected = {"pipefusion 2": {"full", "common", "patch_0", "patch_1"}, "distrifusion 2": {"waiting", "stale"}}
        assert set(programs) == expected.get(method, {"call"})
        for program in programs.values():
            assert_alike(program, again(program))


@pytest.mark.parametrize("method", ["ulysses 2", pytest.param("distrifusion 2", marks=pytest.mark.slow)])
def test_programs_of_a_unet_come_back(method: str) -> None:
    for program in of_rank("unet_sd15", method, 0).values():
        assert_alike(program, again(program))


def test_programs_of_an_autoencoder_come_back_and_run() -> None:
    case = AUTOENCODERS["kl"]
    module = case.build()
    for method in ("decode", "encode"):
        program = capture(module, (case.given(method),), {}, forward=getattr(module, method))
        ranks = partition_rows(infer(program, rulebook()), Plan(ring=2))
        made = [again(rank.program) for rank in ranks]
        for one, other in zip(ranks, made, strict=True):
            assert_alike(one.program, other)
        with torch.no_grad():
            expected = getattr(module, method)(case.given(method))
        for result in run_simulated(made, module, (case.given(method),), {}):
            assert type(result) is type(expected)
            torch.testing.assert_close(tensors_of(result), tensors_of(expected), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", SPLIT)
def test_ranks_compute_the_same(method: str) -> None:
    model = captured("flux")
    programs = [rank["call"] for rank in of_ranks("flux", method)]
    results = [
        run_simulated(each, model.module, model.args, model.kwargs) for each in (programs, list(map(again, programs)))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def drawn(program: Program) -> list[torch.Tensor]:
    """Values for all that a program takes, what comes from another stage included; nothing has arrived yet."""
    draw, tensors = torch.Generator().manual_seed(0), []
    for number, node in enumerate(program.root.graph.find_nodes(op="placeholder")):
        val, spec = node.meta["val"], program.inputs[number] if number < len(program.inputs) else None
        shape = spec.sizes(val.shape) if spec is not None else val.shape
        values = torch.randn(tuple(shape), generator=draw)
        tensors.append(
            values.to(val.dtype) if val.dtype.is_floating_point else torch.zeros(tuple(shape), dtype=val.dtype)
        )
    return tensors


@pytest.mark.parametrize("method", KEEPING)
def test_ranks_that_keep_something_compute_the_same(method: str) -> None:
    ranks = of_ranks("sd3", method)
    for name in ranks[0]:
        programs = [rank[name] for rank in ranks]
        groups = [programs] if method == "distrifusion 2" else [[program] for program in programs]
        for group in groups:
            taken = [list(map(drawn, group)) for _ in range(2)]
            results = [run_ranks(group, taken[0]), run_ranks(list(map(again, group)), taken[1])]
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(*taken, rtol=0, atol=0)


def test_what_was_captured_can_be_split_once_it_is_read() -> None:
    model, plan = captured("pixart"), Plan(tensor=2, cfg=2)
    analysis = dataclasses.replace(model, inference=infer(again(model.inference.program), rulebook())).analysis(plan)
    made = compiled(analysis, plan, Mesh.simulated(plan, 3), until="partition")
    known = compiled(model.analysis(plan), plan, Mesh.simulated(plan, 3), until="partition")
    check(made)
    assert program_text(made.programs["call"]) == program_text(known.programs["call"])


def test_structures_can_be_kept_elsewhere() -> None:
    model = captured("pixart")
    program = model.inference.program
    whole, tensors = program_to_plain(program)
    bare, fewer = program_to_plain(program, structures=False)
    assert len(json.dumps(bare)) < len(json.dumps(whole)) and fewer.keys() <= tensors.keys()
    empty = program_from_plain(bare, fewer)
    assert empty.structures() == {} and len(empty.calls()) == len(program.calls())
    with pytest.raises(NotImplementedError, match="was not kept"):
        run_program(empty, model.module, model.args, model.kwargs)
    filled = program_from_plain(bare, fewer, structures=program.structures())
    assert_alike(program, filled)
    name = next(iter(program.structures()))
    assert isinstance(getattr(program_from_plain(bare, fewer, structures={}).root, name), Absent)


def test_another_process_reads_a_program(tmp_path: Path) -> None:
    program = of_rank("pixart", "ulysses 2", 0)["call"]
    (tmp_path / "program").write_bytes(packed(*program_to_plain(program)))
    code = (
        "import sys; from pathlib import Path\n"
        "from xdit_compile.cache.programs import program_from_plain, unpacked\n"
        f"data = Path({str(tmp_path / 'program')!r}).read_bytes()\n"
        "try: program_from_plain(*unpacked(data))\n"
        "except ValueError as error: print(error)\n"
        "import xdit_compile.compiler; from golden import program_text\n"
        "print(program_text(program_from_plain(*unpacked(data))))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    path = {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=path)
    first, _, text = done.stdout.partition("\n")
    assert "no operator xdit_compile::" in first and "is registered: import what registers it first" in first
    assert text.rstrip("\n") == program_text(program)


def test_equal_structures_of_a_model_have_one_digest() -> None:
    ranks = [rank["call"].structures() for rank in of_ranks("pixart", "cfg 2")]
    digests = [{canonical(each)[1] for each in structures.values()} for structures in ranks]
    assert len(digests[0]) == len(ranks[0])


def template_again(template: Template) -> Template:
    program = dataclasses.replace(captured("pixart").inference.program, outcome=template)
    return again(program).outcome


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_every_make_come_back(name: str) -> None:
    make, read = RESULTS[name]
    before = make()
    made = template_again(Template.of(before))
    tensors = tensors_of(before)
    after = made.filled(tensors)
    assert plain(after) == plain(before) and list(map(id, read(after))) == list(map(id, read(before)))
    assert list(map(id, made.taken(before))) == list(map(id, tensors))


def test_objects_that_stand_twice_or_refer_to_themselves_keep_that() -> None:
    shared: list[Any] = [GRID]
    shared.append(shared)
    made = template_again(Template.of({"a": shared, "b": (shared,)})).filled([GRID])
    assert made["a"] is made["b"][0] is made["a"][1] and made["a"][0] is GRID


def test_the_output_classes_of_diffusers_come_back() -> None:
    model = captured("pixart")
    kwargs = {name: value for name, value in model.kwargs.items() if name != "return_dict"}
    program = capture(model.module, model.args, kwargs)
    result = run_program(again(program), model.module, model.args, kwargs)
    with torch.no_grad():
        expected = model.module(*model.args, **kwargs)
    assert type(result) is type(expected) and list(result) == ["sample"] and result["sample"] is result.sample
    torch.testing.assert_close(result.sample, run_program(program, model.module, model.args, kwargs).sample)


GIVEN: dict[str, Callable[[], Any]] = {
    "output": lambda: Output(GRID, [True]),
    "named tuple": lambda: Pair(GRID, {"a": [GRID, None]}),
    "ordered dict": lambda: collections.OrderedDict(b=GRID, a=GRID),
    "default dict": lambda: collections.defaultdict(list, x=GRID),
    "deque": lambda: collections.deque([GRID], maxlen=2),
}


@pytest.mark.parametrize("name", GIVEN)
def test_arguments_in_containers_of_every_make_come_back(name: str) -> None:
    _, spec = pytree.tree_flatten(((GIVEN[name](),), {}))
    program = dataclasses.replace(captured("pixart").inference.program, in_spec=spec)
    made = again(program).in_spec
    assert made == spec and repr(made) == repr(spec)
    assert repr(pytree.tree_unflatten([1] * spec.num_leaves, made)) == repr(
        pytree.tree_unflatten([1] * spec.num_leaves, spec)
    )


def left_by(program: Program, module: nn.Module, args: tuple, kwargs: dict) -> Any:
    return run_outcome(program, module, args, copy.deepcopy(kwargs))


def test_what_calls_leave_in_containers_and_tensors_comes_back() -> None:
    x, draw = torch.ones(3, 4), torch.Generator().manual_seed(0)
    cases = [(Takes().eval(), (x,), inputs()), (Keeps().eval(), (torch.ones(2, 2, 4),), {"caches": caches(draw)})]
    for module, args, kwargs in cases:
        program = capture(module, args, kwargs)
        assert_alike(program, again(program))
        known, found = (left_by(each, module, args, kwargs) for each in (program, again(program)))
        assert known.changes and repr(known) == repr(found)
        assert [each.number for each in known.left] == [each.number for each in found.left]
        assert [each.position for each in known.written] == [each.position for each in found.written]
        torch.testing.assert_close(tensors_of(known), tensors_of(found), rtol=0, atol=0)


def test_guards_and_constants_come_back() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = [torch.arange(4.0)]

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x[:, : int(mask.sum())] + self.table[0][:3]

    mask = torch.tensor([True, True, False, True])
    module = Reads().eval()
    program = capture(module, (GRID, mask), {})
    made = again(program)
    assert [guard.position for guard in made.guards] == [1] and torch.equal(made.guards[0].value, mask)
    assert_alike(program, made)
    assert torch.equal(run_program(made, module, (GRID, mask), {}), module(GRID, mask))


class Outer:
    def __init__(self, inner: Any):
        self.inner = inner


def local(inner: Any) -> Any:
    class Local(Outer):
        pass

    return Local(inner)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda: [GRID, local(GRID)], "the result of the call: .*'local.<locals>.Local' in the module"),
        (lambda: Outer(torch.Generator()), "torch._C.Generator.*is no value|_C:Generator are not made of attributes"),
        (lambda: Outer({1, 2}), "the result of the call: .*of the type builtins.set is no value"),
        (lambda: [GRID, nn.ReLU()], "the result of the call: .*ReLU.* is no value"),
        (lambda: np.ones(3), "of the type numpy.ndarray is no value"),
    ],
)
def test_results_that_cannot_be_described_are_refused(result: Callable[[], Any], words: str) -> None:
    program = dataclasses.replace(captured("pixart").inference.program, outcome=Template.of(result()))
    with pytest.raises(Unportable, match=words):
        program_to_plain(program)


def test_programs_that_keep_modules_or_strange_constants_are_refused() -> None:
    program = captured("pixart").inference.program
    one = KeptModule(nn.ReLU(), (), pytree.tree_structure(()), (), (), torch.float32, name="experts.0")
    with pytest.raises(Unportable, match="runs modules as they are, which no graph describes: experts.0"):
        program_to_plain(dataclasses.replace(program, kept=(one,)))
    fake = FakeTensorMode().from_tensor(GRID)
    with pytest.raises(Unportable, match="constants/table: a FakeTensor may be more than its values"):
        program_to_plain(dataclasses.replace(program, constants={"table": fake}))
    with pytest.raises(Unportable, match="constants/table: a tensor of the layout torch.sparse_coo"):
        program_to_plain(dataclasses.replace(program, constants={"table": GRID.to_sparse()}))
