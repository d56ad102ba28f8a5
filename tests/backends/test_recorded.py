"""Recordings of all that a rank runs: results that stay, inputs that move, and what is not recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from xdit_compile import Plan
from xdit_compile.backends import recorded
from xdit_compile.backends.recorded import RecordedSites
from xdit_compile.backends.registry import find_backend
from xdit_compile.errors import PlanError, ProviderUnavailable
from xdit_compile.kernels import collectives  # noqa: F401 - registers its ops


class OnTheHost:
    """Records as a CUDA graph does, whose replays read and write the memory of the recording: the host runs again what
    was recorded, and puts the results where the first ones lay. A recording computes nothing itself."""

    device = "cpu"

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        made = pytree.tree_map_only(torch.Tensor, lambda x: torch.full_like(x, float("nan")), run())

        def replay() -> None:
            self.replayed += 1
            for place, result in zip(pytree.tree_leaves(made), pytree.tree_leaves(run()), strict=True):
                place.copy_(result)

        return made, replay


class Block(torch.nn.Module):
    def forward(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.ops.aten.mm.default(x, w),)


def root_of_two_calls() -> fx.GraphModule:
    graph = fx.Graph()
    x, v, w = (graph.placeholder(name) for name in "xvw")
    first = graph.call_module("block", (x, v))
    graph.output(graph.call_module("block", (graph.call_function(lambda t: t[0], (first,)), w)))
    return fx.GraphModule({"block": fx.symbolic_trace(Block())}, graph)


def sites(root: fx.GraphModule | None = None) -> tuple[RecordedSites, OnTheHost]:
    recorder = OnTheHost()
    return RecordedSites(root or root_of_two_calls(), lambda structure, forms: structure, recorder), recorder


def test_results_of_earlier_calls_stay_and_inputs_may_lie_anywhere() -> None:
    root, (run, recorder) = root_of_two_calls(), sites()
    v, w = torch.randn(4, 4), torch.randn(4, 4)
    inputs = [torch.randn(4, 4) for _ in range(6)]
    results = [run(x, v, w)[0] for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(result, root(x, v, w)[0])
    assert (recorder.recorded, recorder.replayed) == (1, 4)
    w.mul_(2)
    assert torch.equal(run(inputs[0], v, w)[0], root(inputs[0], v, w)[0])
    assert recorder.recorded == 1, "weights are read where they lie"


def test_weights_that_move_are_noticed_and_then_copied() -> None:
    root, (run, recorder) = root_of_two_calls(), sites()
    v, w = torch.randn(4, 4), torch.randn(4, 4)
    kept = [torch.randn(4, 4) for _ in range(8)]
    for x in kept[:4]:
        run(x, v, w)
    others = [torch.randn(4, 4) for _ in range(4)]
    for x, other in zip(kept[4:], others, strict=True):
        assert torch.equal(run(x, v, other)[0], root(x, v, other)[0])
    assert recorder.recorded == 2


def test_inputs_with_gaps_and_repeated_rows_keep_their_strides() -> None:
    root, (run, recorder) = root_of_two_calls(), sites()
    v, w = torch.randn(4, 4), torch.randn(4, 4)
    kept = []
    for _ in range(4):
        kept += [torch.randn(8, 8)[::2, ::2], torch.randn(1, 4).expand(4, 4)]
    for each in kept:
        assert torch.equal(run(each, v, w)[0], root(each, v, w)[0])
    assert recorder.recorded == 2 and recorder.replayed == 4


def test_what_moves_again_and_again_runs_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"w{number}" for number in range(6)]
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in names]
    graph.output(graph.call_module("block", (inputs[0], graph.call_function(sum_of, (inputs[1:],)))))
    root = fx.GraphModule({"block": fx.symbolic_trace(Block())}, graph)
    run, recorder = sites(root)
    given, kept = [torch.randn(4, 4) for _ in names], []
    for call in range(8):
        kept.append(given[call % 6])
        given[max(call - 2, 0)] = torch.randn(4, 4)
        assert torch.equal(run(*given)[0], root(*given)[0])
    assert recorder.recorded == recorded.MOST_RECORDINGS
    assert "lie elsewhere again and again" in caplog.text


def sum_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(tensors)).sum(0)


def test_what_reaches_other_ranks_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    reduced = graph.call_function(torch.ops.xdit_compile.all_reduce.default, (x, "no such group"))
    graph.output((reduced,))
    assert "reaches other ranks" in recorded.unrecordable(fx.GraphModule({}, graph))
    assert recorded.unrecordable(root_of_two_calls()) == ""
    root = root_of_two_calls()
    root.block.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[
        0
    ].target = torch.ops.xdit_compile.all_reduce.default
    with caplog.at_level(logging.WARNING, logger="xdit_compile"):
        sites(root)
    assert "CUDA graphs were asked for, and kernels are launched one by one" in caplog.text


def test_a_recording_that_fails_leaves_the_call_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(OnTheHost):
        def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
            raise RuntimeError("operation not permitted when stream is capturing")

    root = root_of_two_calls()
    run = RecordedSites(root, lambda structure, forms: structure, Failing())
    given = [torch.randn(4, 4) for _ in range(3)]
    for _ in range(4):
        assert torch.equal(run(*given)[0], root(*given)[0])
    assert caplog.text.count("cannot be recorded: operation not permitted") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_graphs_are_refused_where_there_is_no_card() -> None:
    with pytest.raises(ProviderUnavailable, match="'reduce-overhead' records CUDA graphs, and there is no CUDA device"):
        find_backend("auto", "reduce-overhead")
    with pytest.raises(ProviderUnavailable, match="there is no CUDA device here; leave it out"):
        find_backend("inductor", options={"triton.cudagraphs": True})
    assert find_backend("inductor", "max-autotune")._options()["max_autotune"]
    assert "triton.cudagraphs" not in find_backend("inductor", "max-autotune")._options()


def test_graphs_are_refused_where_a_rank_does_not_run_alone() -> None:
    for mode, other in (("reduce-overhead", "default"), ("max-autotune", "max-autotune-no-cudagraphs")):
        with pytest.raises(
            PlanError, match=f"'{mode}' records .* 2 ranks send to one another; take compile_mode='{other}'"
        ):
            Plan(ulysses=2, compile_mode=mode).check()
        Plan(ulysses=2, compile_mode=mode, backend_options={"triton.cudagraphs": False}).check()
    with pytest.raises(PlanError, match="patches are kept over steps"):
        Plan(patches=2, compile_mode="reduce-overhead").check()
    with pytest.raises(PlanError, match=r"triton.cudagraphs=True records .*; leave it out"):
        Plan(ulysses=2, backend_options={"triton.cudagraphs": True}).check()
