"""Backends: what they compile, and what they say where they cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import procs
import pytest
import torch
import torch.nn.functional as F
from splitting import CASES, worst_difference
from torch import fx
from torch.utils import _pytree as pytree

import xdit_compile
from xdit_compile import Plan
from xdit_compile.backends import registry
from xdit_compile.backends.aot_eager import AotEager, decomposed
from xdit_compile.backends.base import ByStructure
from xdit_compile.backends.eager import Eager
from xdit_compile.backends.forms import TensorForm
from xdit_compile.backends.inductor import Inductor, compile_threads
from xdit_compile.backends.sites import Sites
from xdit_compile.errors import PlanError, ProviderUnavailable
from xdit_compile.kernels import attention, collectives, draws  # noqa: F401 - they register their ops
from xdit_compile.plan.plan import BACKENDS


def root_of_two_calls() -> fx.GraphModule:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.ops.aten.relu.default(torch.ops.aten.mm.default(x, w)),)

    graph = fx.Graph()
    x, v, w = (graph.placeholder(name) for name in "xvw")
    first = graph.call_module("block", (x, v))
    second = graph.call_module("block", (graph.call_function(lambda t: t[0], (first,)), w))
    graph.output(second)
    return fx.GraphModule({"block": fx.symbolic_trace(Block())}, graph)


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=generator) for _ in range(3)]


def test_every_backend_of_a_plan_is_registered() -> None:
    assert set(registry.backends()) | {"auto"} == set(BACKENDS)
    assert registry.find_backend("auto").unavailable() is None


def test_a_structure_called_twice_is_compiled_once() -> None:
    root = root_of_two_calls()
    (expected,) = root(*inputs())
    compiled = []

    class Counting(ByStructure):
        name = "counting"

        def compile_structure(self, structure: fx.GraphModule) -> torch.nn.Module:
            compiled.append(structure)
            return structure

    (found,) = Counting().compile(root)(*inputs())
    assert len(compiled) == 1 and torch.equal(found, expected)


def test_eager_writes_all_calls_into_one_graph() -> None:
    root = root_of_two_calls()
    flat = Eager().compile(root)
    assert not flat.graph.find_nodes(op="call_module") and torch.equal(flat(*inputs())[0], root(*inputs())[0])


def test_inductor_gives_the_same_and_compiles_nothing_twice() -> None:
    root, backend = root_of_two_calls(), Inductor()
    (expected,) = root(*inputs())
    for _ in range(2):
        (found,) = backend.compile(root)(*inputs())
        torch.testing.assert_close(found, expected)
    assert backend.codes.counts.compiled == 1


def test_a_mode_reaches_inductor_and_is_refused_elsewhere() -> None:
    root = root_of_two_calls()
    (expected,), mode = root(*inputs()), "max-autotune-no-cudagraphs"
    with mock.patch.object(
        torch._inductor, "standalone_compile", wraps=torch._inductor.standalone_compile
    ) as compiling:
        (found,) = registry.find_backend("inductor", mode).compile(root)(*inputs())
    torch.testing.assert_close(found, expected)
    assert compiling.call_args.kwargs["options"]["config_patches"]["max_autotune"]
    assert isinstance(registry.find_backend("auto", mode), Inductor)
    with pytest.raises(PlanError, match="compile_mode='max-auto.* is inductor's, and backend='eager'; change one"):
        Plan(compile_mode=mode, backend="eager").check()
    with pytest.raises(PlanError, match="choose one of default, reduce-overhead, max-autotune, max-autotune-no-cuda"):
        Plan(compile_mode="fastest").check()


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return ((F.gelu(F.layer_norm(x @ w, [4])) + self.shift).softmax(-1),)


def root_of_norms() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_module("block", tuple(graph.placeholder(name) for name in "xw")))
    return fx.GraphModule({"block": fx.symbolic_trace(Normed())}, graph)


def test_aot_eager_calls_what_is_left_after_the_decompositions_of_inductor() -> None:
    root, (x, w, _) = root_of_norms(), inputs()
    names = {str(node.target) for node in decomposed(root.block, (x, w)).graph.nodes}
    assert {"aten.mm.default", "aten.erf.default", "aten.exp.default"} <= names
    assert not any(word in name for name in names for word in ("layer_norm", "gelu", "softmax"))
    torch.testing.assert_close(AotEager().compile(root)(x, w), root(x, w), atol=1e-6, rtol=1e-6)


def test_aot_eager_shows_a_wrong_decomposition_and_eager_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import decomposition

    wrong = {**decomposition.select_decomp_table(), torch.ops.aten.gelu.default: lambda x, approximate="none": x / 2}
    monkeypatch.setattr(decomposition, "select_decomp_table", lambda: wrong)
    root, (x, w, _) = root_of_norms(), inputs()
    off = [(backend.compile(root)(x, w)[0] - root(x, w)[0]).abs().max() for backend in (Eager(), AotEager())]
    assert off[0] == 0 and off[1] > 1e-2


def test_aot_eager_keeps_ops_that_reach_others_as_calls_in_order() -> None:
    """Also one whose result nobody reads, which the other ranks wait in; none of them is run while it is recorded."""
    ops, graph = torch.ops.xdit_compile, fx.Graph()
    x = graph.placeholder("x")
    size = {"dtype": torch.float32, "device": torch.device("cpu")}
    calls = [
        graph.call_function(ops.all_reduce.default, (x, "no such group", "max")),
        graph.call_function(ops.draw.default, ("randn", [1, 2, 3, 4], 0, -1), size),
        graph.call_function(ops.all_reduce.default, (x, "no such group")),
    ]
    calls.append(graph.call_function(ops.attention.default, (calls[-1], x, calls[1])))
    graph.output((calls[-1],))
    found = decomposed(fx.GraphModule({}, graph), (torch.ones(1, 2, 3, 4),)).graph
    assert [node.target for node in found.nodes if node.op == "call_function"] == [node.target for node in calls]


def run_split(rank: int, name: str, *plans: Plan) -> float:
    """The greatest difference of a model from the unsplit one under any of the plans, of its greatest value."""
    worst = 0.0
    for plan in plans:
        module = CASES[name].build()
        args, kwargs = CASES[name].inputs()
        with torch.no_grad():
            expected = pytree.tree_leaves(module(*args, **kwargs))
        xdit_compile.parallelize(module, plan)
        worst = max(worst, *[worst_difference(module(*args, **kwargs), expected) for _ in range(2)])
        xdit_compile.restore(module)
    return worst


@pytest.mark.parametrize("name", ["flux", "unet_sd15"])
def test_aot_eager_gives_what_the_module_gives(name: str) -> None:
    assert run_split(0, name, Plan(backend="aot_eager")) <= 2e-5


@pytest.mark.slow
def test_aot_eager_gives_it_on_two_processes() -> None:
    splits = ({"ulysses": 2}, {"ring": 2, "attention": "chunked"}, {"tensor": 2})
    assert max(procs.run(run_split, 2, "flux", *[Plan(**each, backend="aot_eager") for each in splits])) <= 2e-5


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ProviderUnavailable, match="'tvm' is unknown; choose one of"):
        registry.find_backend("tvm")


def test_inductor_rounds_where_the_graph_does() -> None:
    """Fused operators that keep more digits than bfloat16 has give another time step, and another picture."""

    class Scaled(torch.nn.Module):
        def forward(self, time: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.cos((time * 1000).float()),)

    graph = fx.Graph()
    graph.output(graph.call_module("block", (graph.placeholder("time"),)))
    root = fx.GraphModule({"block": fx.symbolic_trace(Scaled())}, graph)
    times = torch.linspace(0, 1, 50).to(torch.bfloat16)
    assert (Inductor().compile(root)(times)[0] - root(times)[0]).abs().max() < 1e-5


def test_ranks_of_one_machine_share_its_processors_for_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import async_compile, config

    read = []

    def read_inside(graph: fx.Graph) -> None:
        read.append(async_compile.get_compile_threads())
        raise KeyboardInterrupt("that is far enough")

    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(24)))
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with config.patch(compile_threads=24, post_grad_custom_post_pass=read_inside), pytest.raises(KeyboardInterrupt):
        Inductor().compile(root_of_two_calls())(*inputs())
    assert read == [3]


@pytest.mark.parametrize(
    ("environment", "set_to", "found"),
    [({}, 24, 24), ({"LOCAL_WORLD_SIZE": "4"}, 24, 6), ({"LOCAL_WORLD_SIZE": "64"}, 24, 1)]
    + [({"LOCAL_WORLD_SIZE": "4"}, 7, None), ({"TORCHINDUCTOR_COMPILE_THREADS": "24"}, 24, None)],
)
def test_a_number_of_workers_that_the_user_chose_stays(environment, set_to, found, monkeypatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(24)))
    with config.patch(compile_threads=set_to):
        assert compile_threads(environment) == found


def test_calls_go_to_what_was_compiled_for_the_strides_of_the_inputs() -> None:
    root, forms = root_of_two_calls(), []

    def compiled(structure: fx.GraphModule, args: Sequence[TensorForm]) -> fx.GraphModule:
        forms.append([arg.stride for arg in args])
        return structure

    sites, (x, v, w) = Sites(root, compiled), inputs()
    for given in ((x, v, w), (v, x, w), (x.T, v, w), (x, v.T, w), (x, v, w), (x.T, v, w)):
        assert torch.equal(sites(*given)[0], root(*given)[0])
    assert forms == [[(4, 1), (4, 1)], [(1, 4), (4, 1)], [(4, 1), (1, 4)]]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if before != "tf32" else "ieee"
    try:
        sites(x, v, w)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(forms) == 4
