"""Graphs that were captured on the host as they are on a card."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

import xdit_compile.kernels.attention  # noqa: F401  (registers the op)

from .pretend_card import DEVICE

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
OPAQUE = torch.ops.xdit_compile.attention.default
PROVIDER = "sdpa"


def on_card(root: fx.GraphModule) -> fx.GraphModule:
    """The same graph, with those that it calls, on the card: new tensors are made there, attention is one operator.

    PyTorch takes attention apart by asking the card which of its kernels it can run. Here it stays whole, so that it is
    chosen when it runs, as where nothing is compiled.
    """
    graph = copy.deepcopy(root.graph)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is ATTENTION:
            _keep_whole(node)
        node.args, node.kwargs = (map_aggregate(each, _moved) for each in (node.args, node.kwargs))
    called = {str(node.target): root.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")}
    moved = fx.GraphModule(root, graph)
    for name, child in called.items():
        moved.add_submodule(name, on_card(child) if isinstance(child, fx.GraphModule) else child)
    return moved


def _keep_whole(node: fx.Node) -> None:
    names = [argument.name for argument in ATTENTION._schema.arguments]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    renamed = {"attn_mask": "mask"} | {name: name for name in ("is_causal", "scale", "enable_gqa")}
    node.args = tuple(given[name] for name in ("query", "key", "value"))
    node.kwargs = {other: given[name] for name, other in renamed.items() if name in given} | {"provider": PROVIDER}
    node.target = OPAQUE


def _moved(value: Any) -> Any:
    """The card in the place of the host."""
    return DEVICE if isinstance(value, torch.device) and value.type == "cpu" else value
