"""Graphs as plain data: equal up to names they have one digest; what cannot be described is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from xdit_compile.cache.graphs import canonical, graph_from_plain, graph_to_plain
from xdit_compile.cache.unportable import Unportable

GRID = torch.arange(12.0).reshape(3, 4)
aten = torch.ops.aten


def structure(prefix: str = "", **changed: Any) -> fx.GraphModule:
    """A small structure: names and what it computes can be chosen."""
    with_ = {"scale": 2.0, "dim": 1, "dtype": torch.float16, "op": aten.sum.dim_IntList, "table": GRID}
    with_ |= changed
    graph = fx.Graph()
    x = graph.placeholder(f"{prefix}x")
    x.meta["val"] = GRID.to("meta")
    table = graph.get_attr(f"{prefix}table")
    scaled = graph.call_function(aten.mul.Tensor, (x, with_["scale"]), name=f"{prefix}scaled")
    summed = graph.call_function(with_["op"], (scaled, [with_["dim"]]), {"keepdim": True}, name=f"{prefix}summed")
    summed.meta.update(path=f"{prefix}blocks", shape=(f"{prefix}sum", [3, 1]))
    cast = graph.call_function(aten._to_copy.default, (summed,), {"dtype": with_["dtype"]})
    joined = graph.call_function(aten.add.Tensor, (cast, table))
    graph.output((joined,))
    return fx.GraphModule({f"{prefix}table": with_["table"]}, graph)


def test_structures_that_differ_in_names_alone_have_one_digest() -> None:
    one, other = canonical(structure()), canonical(structure("other_"))
    assert one == other and len(one[1]) == 64
    assert [node["name"] for node in one[0]["nodes"]] == [f"n{number}" for number in range(7)]
    assert set(one[0]["tensors"]["t0"]) == {"shape", "stride", "dtype", "sha256"}
    described, tensors = graph_to_plain(structure())
    assert canonical(graph_from_plain(described, tensors)) == one


@pytest.mark.parametrize(
    "changed",
    [
        {"scale": 2}, {"scale": 2.5}, {"dim": 0}, {"dtype": torch.bfloat16}, {"op": aten.mean.dim},
        {"table": GRID + 1}, {"table": GRID.t().contiguous().t()}, {"table": GRID.double()},
    ],
    ids=str,
)  # fmt: skip
def test_structures_that_compute_something_else_have_other_digests(changed: dict[str, Any]) -> None:
    assert canonical(structure(**changed))[1] != canonical(structure())[1]


def graph_of(build: Callable[[fx.Graph, fx.Node], Any], root: Any = None) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((build(graph, graph.placeholder("x")),))
    return fx.GraphModule(root or nn.Module(), graph)


def symbolic(graph: fx.Graph, x: fx.Node) -> fx.Node:
    x.meta["val"] = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(3, 4))
    return x


GRAPHS: dict[str, tuple[Callable[[], fx.GraphModule], str]] = {
    "function": (
        lambda: graph_of(lambda graph, x: graph.call_function(torch.relu, (x,))),
        "^relu: it calls .*relu, which is no operator of PyTorch's",
    ),
    "method": (
        lambda: graph_of(lambda graph, x: graph.call_method("relu", (x,))),
        "^relu: it calls the method 'relu'",
    ),
    "module": (
        lambda: graph_of(lambda graph, x: graph.call_module("inner", (x,)), {"inner": nn.ReLU()}),
        "^inner: it calls inner, which is a ReLU and no graph",
    ),
    "argument": (
        lambda: graph_of(lambda graph, x: graph.call_function(aten.add.Tensor, (x, GRID))),
        "^add_tensor: a torch.Tensor is no value",
    ),
    "symbolic": (lambda: graph_of(symbolic), "^x: .*of the type torch.SymInt is no value"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_that_cannot_be_described_are_refused(name: str) -> None:
    make, words = GRAPHS[name]
    with pytest.raises(Unportable, match=words):
        graph_to_plain(make())


def changed(plain_nodes: list[dict[str, Any]]) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """What is wrong, how it is made so, and what is said of it."""
    last = plain_nodes[-2]
    yield "operator", lambda: last.update(target={"operator": "aten::no_such.Tensor"}), "no operator aten::no_such"
    yield "function", lambda: last.update(target={"function": "eval"}), "no function eval that graphs may call"
    yield "order", lambda: last.update(args=[{"node": "output"}]), "output makes, which does not come before it"
    yield "name", lambda: last.update(name="def"), "no node of a graph can have this name"


@pytest.mark.parametrize("number", range(4))
def test_descriptions_that_stand_for_no_graph_are_refused(number: int) -> None:
    described, tensors = graph_to_plain(structure())
    _, change, words = list(changed(described["nodes"]))[number]
    change()
    with pytest.raises(Unportable, match=words):
        graph_from_plain(described, tensors)
