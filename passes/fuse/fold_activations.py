"""Has the product in front of an activation apply it, so that what comes between is neither written nor read."""

from __future__ import annotations

import torch
from torch import fx

from xdit_compile.capture.mutations import named_arguments
from xdit_compile.kernels import linears  # noqa: F401 - registers the op
from xdit_compile.passes.memory.on_meta import Shapes

from .equal_values import EqualValues
from .rewriting import Fusion, put_in_place
from .selection import Choice, Chooser, Cost, Found, Site, bytes_of

aten = torch.ops.aten
ACTIVATIONS = (aten.gelu.default, aten.silu.default, aten.relu.default)
OTHER = "products know no activation but gelu by tanh"
USED = "the product's result is used by others, too"
WRITTEN = "the value is written to"
UNLIKE = "the product has no bias, or weights of another dtype"


def _rewrite(graph: fx.Graph, shapes: Shapes, chooser: Chooser) -> Found:
    result, values, chosen = Found(), EqualValues(graph), []
    for node in [node for target in ACTIVATIONS for node in graph.find_nodes(op="call_function", target=target)]:
        linear = node.args[0]
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
            continue
        reason = WRITTEN if any(map(values.is_written, linear.all_input_nodes)) else _apart(node, linear, shapes)
        choice = Choice(reason, "") if reason else chooser.choose(_site(node, linear, shapes), shapes)
        if result.takes(choice):
            chosen.append((node, linear))
    for node, linear in chosen:
        put_in_place(node, torch.ops.xdit_compile.linear_gelu.default, linear.args)
    return result


def _site(node: fx.Node, linear: fx.Node, shapes: Shapes) -> Site:
    """A product and its activation: by itself that is a kernel, which reads what the product wrote."""
    read, made = bytes_of(linear.args, shapes), shapes[linear].nbytes
    return Site(tuple(linear.all_input_nodes), (node,), Cost(read + 3 * made, 2), Cost(read + made, 1))


def _apart(node: fx.Node, linear: fx.Node, shapes: Shapes) -> str | None:
    """Why an activation is not folded into a product; None where it can be."""
    if node.target is not aten.gelu.default or named_arguments(node).get("approximate") != "tanh":
        return OTHER
    if len(linear.users) > 1:
        return USED
    operands = [shapes.get(each) for each in linear.args if isinstance(each, fx.Node)]
    alike = {None if value is None else value.dtype for value in operands}
    return None if len(operands) == 3 and len(alike) == 1 and None not in alike else UNLIKE


fold_activations = Fusion("fold_activations", "activations applied by the products before them", _rewrite)
"""The pass; which activations those are is the same in every call of a structure."""
