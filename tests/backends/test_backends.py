"""Backends: what they compile, and what they say where they cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters

from xdit_compile import Plan
from xdit_compile.backends import registry
from xdit_compile.backends.base import ByStructure
from xdit_compile.backends.eager import Eager
from xdit_compile.backends.inductor import Inductor, compile_threads
from xdit_compile.backends.sites import Sites
from xdit_compile.errors import PlanError, ProviderUnavailable
from xdit_compile.plan import BACKENDS


def root_of_two_calls() -> fx.GraphModule:
    class Block(torch.nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.relu(x @ w),)

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


def test_inductor_gives_the_same_and_keeps_what_it_compiled_for_other_processes() -> None:
    root = root_of_two_calls()
    (expected,) = root(*inputs())
    counters.clear()
    (found,) = Inductor().compile(root)(*inputs())
    torch.testing.assert_close(found, expected)
    assert counters["inductor"] and not counters["inductor"]["fxgraph_cache_bypass"]


def test_a_mode_reaches_inductor_and_is_refused_elsewhere() -> None:
    root = root_of_two_calls()
    (expected,), mode = root(*inputs()), "max-autotune-no-cudagraphs"
    with mock.patch.object(torch._inductor, "compile", wraps=torch._inductor.compile) as compiling:
        (found,) = registry.find_backend("inductor", mode).compile(root)(*inputs())
    torch.testing.assert_close(found, expected)
    assert compiling.call_args.kwargs["options"]["max_autotune"]
    assert isinstance(registry.find_backend("auto", mode), Inductor)
    with pytest.raises(PlanError, match="compile_mode='max-auto.* is inductor's, and backend='eager'; change one"):
        Plan(compile_mode=mode, backend="eager").check()
    with pytest.raises(PlanError, match="choose one of default, max-autotune-no-cudagraphs"):
        Plan(compile_mode="reduce-overhead").check()


def test_nexfort_says_how_to_get_it_where_it_is_missing() -> None:
    if registry.backends()["nexfort"].unavailable() is None:
        pytest.skip("nexfort is installed")
    with pytest.raises(ProviderUnavailable, match=r"nexfort.*not installed.*pip install"):
        registry.find_backend("nexfort")


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

    def compiled(structure: fx.GraphModule, args: Sequence[torch.Tensor]) -> fx.GraphModule:
        forms.append([arg.stride() for arg in args])
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
