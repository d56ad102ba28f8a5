"""Takes a product of several values side by side as a sum of products, so that they are not copied together first."""

from __future__ import annotations

import operator

import torch
from torch import fx

from xdit_compile.ir.arguments import node_of, sequence_of
from xdit_compile.kernels import linears  # noqa: F401 - registers the op
from xdit_compile.passes.memory.on_meta import Shapes, name_of

from .equal_values import EqualValues
from .rewriting import Found, Fusion, put_in_place

aten = torch.ops.aten
USED = "the joined value is used by others, too"
WRITTEN = "a value is written to"
WIDE = "the sum of products would move more than the copy"
POINTWISE = torch.Tag.pointwise
VIEWS = ("slice", "split", "split_with_sizes", "reshape", "view", "permute", "transpose", "unsqueeze", "expand")


def _rewrite(graph: fx.Graph, shapes: Shapes) -> Found:
    result, values = Found(), EqualValues(graph)
    for linear in graph.find_nodes(op="call_function", target=aten.linear.default):
        joined = linear.args[0]
        if not isinstance(joined, fx.Node) or joined.target is not aten.cat.default or not _by_features(joined, shapes):
            continue
        reason = WRITTEN if any(map(values.is_written, joined.all_input_nodes)) else _apart(linear, joined, shapes)
        if reason is not None:
            result.apart[reason] += 1
            continue
        arguments = (list(sequence_of(joined.args[0])), linear.args[1], linear.args[2] if linear.args[2:] else None)
        put_in_place(linear, torch.ops.xdit_compile.linear_of_parts.default, arguments)
        result.changed += 1
    return result


def _by_features(joined: fx.Node, shapes: Shapes) -> bool:
    """Whether values are joined along their last dim."""
    dim = joined.args[1] if joined.args[1:] else 0
    return joined in shapes and dim in (-1, shapes[joined].dim() - 1)


def _apart(linear: fx.Node, joined: fx.Node, shapes: Shapes) -> str | None:
    """Why a product keeps its operand in one piece; None where it need not.

    A copy costs a read and a write of every part that nothing writes to its place, the sum of products a read and a
    write of the result for every part but one.
    """
    if len(joined.users) > 1:
        return USED
    parts = list(map(node_of, sequence_of(joined.args[0])))
    copied = sum(shapes[part].nbytes for part in parts if not _in_place(part, shapes))
    return None if copied > (len(parts) - 1) * shapes[linear].nbytes else WIDE


def _in_place(node: fx.Node, shapes: Shapes) -> bool:
    """Whether inductor has a part written to its place: a matrix by the product that makes it, and what a kernel makes
    that computes element by element, views of that, too."""
    if node.target is aten.linear.default and shapes[node].dim() == 2:
        return True
    while node.op == "call_function" and (name_of(node) in VIEWS or node.target is operator.getitem):
        node = node_of(node.args[0])
    return name_of(node) == "cat" or isinstance(node.target, torch._ops.OpOverload) and POINTWISE in node.target.tags


split_concatenations = Fusion("split_concatenations", "products of joined values taken part by part", _rewrite)
"""The pass; the order of the parts is the same in every call of a structure."""
