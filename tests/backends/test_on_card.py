"""Graphs as they are on a card: attention is one operator that computes the same, and new tensors are made there."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from xdit_compile.backends.target.on_card import ATTENTION, OPAQUE, on_card

aten = torch.ops.aten


@pytest.mark.parametrize(
    "asked",
    [
        ((), {}),
        (("mask",), {}),
        ((None, 0.0, True), {"scale": 0.5}),
        ((), {"enable_gqa": True}),
    ],
    ids=["plain", "mask", "causal", "shared heads"],
)
def test_attention_stays_one_operator(asked: tuple) -> None:
    torch.manual_seed(0)
    rest, named = asked
    q, mask = torch.randn(2, 4, 6, 8), torch.randn(2, 1, 6, 6)
    k, v = torch.randn(2, 2, 2 if named.get("enable_gqa") else 4, 6, 8).unbind(0)
    graph = fx.Graph()
    names = {name: graph.placeholder(name) for name in ("q", "k", "v", "mask")}
    args = tuple(names.get(each, each) if isinstance(each, str) else each for each in ("q", "k", "v", *rest))
    graph.output((graph.call_function(ATTENTION, args, named),))
    root = fx.GraphModule(nn.Module(), graph)

    moved = on_card(root)
    assert [node.target for node in moved.graph.find_nodes(op="call_function", target=OPAQUE)] == [OPAQUE]
    ((expected,), (result,)) = root(q, k, v, mask), moved(q, k, v, mask)
    assert float((result - expected).abs().max() / expected.abs().max()) <= 2e-5


def test_new_tensors_are_made_there_and_the_graph_is_as_it_was() -> None:
    inner, outer = fx.Graph(), fx.Graph()
    made = inner.call_function(aten.arange.default, (4,), {"device": torch.device("cpu")})
    inner.output((inner.call_function(aten.add.Tensor, (inner.placeholder("x"), made)),))
    outer.output(outer.call_module("inner", (outer.placeholder("x"),)))
    root = fx.GraphModule({"inner": fx.GraphModule(nn.Module(), inner)}, outer)

    found = [
        each.get_submodule("inner").graph.find_nodes(op="call_function", target=aten.arange.default)[0].kwargs["device"]
        for each in (on_card(root), root)
    ]
    assert [device.type for device in found] == ["cuda", "cpu"]
