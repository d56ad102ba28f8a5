"""Taking out of a recorded graph what has no meaning for it: assertions, ambient state and identities."""

from __future__ import annotations

from typing import Any

import torch
import torch.amp.autocast_mode
from torch import fx

from xdit_compile.errors import CaptureError
from xdit_compile.ir.arguments import integer_of, node_of, sequence_of

from .mutations import CONVERSIONS, named_arguments, written_arguments

aten = torch.ops.aten

NOISE = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
    torch._C._set_grad_enabled,
}


def simplify(module: fx.GraphModule) -> None:
    """Inline regions of ambient state and erase assertions and identities, with what then has no use.

    Nodes that were unused before stay: blocks of equal structure shall stay equal where a caller ignores a result.

    Raises:
        CaptureError: for a region of ambient state that changes what its operators compute.
    """
    inline_regions(module)
    drop_autocast(module.graph)
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node.target in NOISE:
            erase_with_sources(node)


def erase_with_sources(node: fx.Node) -> None:
    """Erase an unused node, then those it read that have no other user and write nothing."""
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and source.op in ("call_function", "get_attr") and not written_arguments(source):
            erase_with_sources(source)


def is_identity(node: fx.Node) -> bool:
    """Whether a node returns its first argument itself."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in CONVERSIONS or not isinstance(node.args[0], fx.Node):
        return False
    given = named_arguments(node)
    if given.get("copy") or given.get("train"):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, torch.Tensor)
        and isinstance(after, torch.Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
        and before.shape == after.shape
        and before.stride() == after.stride()
    )


def inline_regions(module: fx.GraphModule) -> None:
    """Inline the sub-graphs that run with autocast or gradients switched off: neither is on where a program runs."""
    wraps = {torch.ops.higher_order.wrap_with_set_grad_enabled: 1, torch.ops.higher_order.wrap_with_autocast: 4}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in wraps:
            continue
        place = wraps[node.target]
        holder = node_of(node.args[place])
        body = module.get_submodule(str(holder.target))
        assert isinstance(body, fx.GraphModule)
        if place == 4:
            check_autocast(node, list(body.graph.nodes))
        inline_regions(body)
        _inline(node, body.graph, node.args[place + 1 :])
        module.graph.erase_node(holder)
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)


def drop_autocast(graph: fx.Graph) -> None:
    """Erase the marks where autocast begins and ends.

    Raises:
        CaptureError: where it is on and changes a dtype.
    """
    opened: dict[fx.Node, list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.target is torch.amp.autocast_mode._exit_autocast:
            start = node_of(node.args[0])
            check_autocast(start, opened.pop(start))
            graph.erase_node(node)
            graph.erase_node(start)
        for inside in opened.values():
            inside.append(node)
        if node.target is torch.amp.autocast_mode._enter_autocast:
            opened[node] = []


def check_autocast(start: fx.Node, inside: list[fx.Node]) -> None:
    """See to it that autocast, if it is on, finds every floating tensor in its own dtype already.

    Raises:
        CaptureError: where it would convert one.
    """
    device, dtype, enabled, *_ = start.args
    if not enabled or (device == "cpu" and dtype == torch.float32):
        return
    read = {value for node in inside for value in (node, *node.all_input_nodes)}
    values = [node.meta.get("val") for node in read]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type == device:
            if value.dtype not in (dtype, torch.float64):
                raise CaptureError(f"{start.name} runs under autocast from {value.dtype} to {dtype}; switch it off")


def _inline(node: fx.Node, body: fx.Graph, arguments: Any) -> None:
    graph = node.graph
    values = dict(zip(body.find_nodes(op="placeholder"), arguments, strict=True))
    with graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "call_function":
                values[inner] = graph.node_copy(inner, lambda other: values[other])
                values[inner].meta.setdefault("calls", node.meta["calls"])
    results = body.output_node().args[0]
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(values[results])
    else:
        for user in list(node.users):
            user.replace_all_uses_with(values[sequence_of(results)[integer_of(user.args[1])]])
            graph.erase_node(user)
    graph.erase_node(node)
