"""Takes a product of several values side by side as a sum of products, so that they are not copied together first.

In half precision the sum is rounded once more than the product would be for each part but one. So all parts but one
must be rounded once less, as an activation is that the product before it applied.
"""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx

from xdit_compile.ir.arguments import node_of, sequence_of
from xdit_compile.kernels import linears  # noqa: F401 - registers the op
from xdit_compile.passes.memory.on_meta import Shapes, name_of

from .equal_values import EqualValues
from .rewriting import Fusion, put_in_place
from .selection import Choice, Chooser, Cost, Found, Site, bytes_of

aten = torch.ops.aten
LINEAR_GELU = torch.ops.xdit_compile.linear_gelu.default
USED = "the joined value is used by others, too"
WRITTEN = "a value is written to"
ROUNDED = "the sum would be rounded more often"
POINTWISE = torch.Tag.pointwise
VIEWS = ("slice", "split", "split_with_sizes", "reshape", "view", "permute", "transpose", "unsqueeze", "expand")


def _rewrite(graph: fx.Graph, shapes: Shapes, chooser: Chooser) -> Found:
    result, values, chosen = Found(), EqualValues(graph), []
    for linear in graph.find_nodes(op="call_function", target=aten.linear.default):
        joined = linear.args[0]
        if not isinstance(joined, fx.Node) or joined.target is not aten.cat.default or not _by_features(joined, shapes):
            continue
        reason = USED if len(joined.users) > 1 else None
        reason = WRITTEN if any(map(values.is_written, joined.all_input_nodes)) else reason
        choice = Choice(reason, "") if reason else chooser.choose(_site(linear, joined, shapes), shapes)
        if choice.reason is None and _is_rounded_more(joined, shapes):
            choice = choice._replace(reason=ROUNDED)
        if result.takes(choice):
            chosen.append((linear, joined))
    for linear, joined in chosen:
        arguments = (list(sequence_of(joined.args[0])), linear.args[1], linear.args[2] if linear.args[2:] else None)
        put_in_place(linear, torch.ops.xdit_compile.linear_of_parts.default, arguments)
    return result


def _by_features(joined: fx.Node, shapes: Shapes) -> bool:
    """Whether values are joined along their last dim."""
    dim = joined.args[1] if joined.args[1:] else 0
    return joined in shapes and dim in (-1, shapes[joined].dim() - 1)


def _site(linear: fx.Node, joined: fx.Node, shapes: Shapes) -> Site:
    """A product of values that are joined, with what writes some of them to their places.

    A copy costs a read and a write of every part that nothing writes to its place, the sum of products a read and a
    write of the result for every part but one.
    """
    parts = list(map(node_of, sequence_of(joined.args[0])))
    makers = [_maker(part, shapes) for part in parts]
    copied = sum(shapes[each].nbytes for each, maker in zip(parts, makers, strict=True) if maker is None)
    result = shapes[linear].nbytes
    all_read = shapes[joined].nbytes + bytes_of(linear.args[1:], shapes)
    sources = [maker.all_input_nodes if maker else [each] for each, maker in zip(parts, makers, strict=True)]
    weights = [each for each in linear.args[1:] if isinstance(each, fx.Node)]
    return Site(
        (*itertools.chain(*sources), *weights), (linear,),
        apart=Cost(2 * copied + all_read + result, 1 + (copied > 0)),
        fused=Cost(all_read + (2 * len(parts) - 1) * result, len(parts)),
    )  # fmt: skip


def _is_rounded_more(joined: fx.Node, shapes: Shapes) -> bool:
    """Whether a sum of products has more roundings than one product of what is joined."""
    others = [part for part in sequence_of(joined.args[0]) if _source(node_of(part)).target is not LINEAR_GELU]
    return shapes[joined].dtype.itemsize < 4 and len(others) > 1


def _source(node: fx.Node) -> fx.Node:
    """What a value is, or is a view of."""
    while node.op == "call_function" and (name_of(node) in VIEWS or node.target is operator.getitem):
        node = node_of(node.args[0])
    return node


def _maker(node: fx.Node, shapes: Shapes) -> fx.Node | None:
    """What inductor has write a part to its place, if it does: the product that makes a matrix, and what computes
    element by element what the part is or is a view of."""
    if node.target is aten.linear.default and shapes[node].dim() == 2:
        return node
    node = _source(node)
    is_pointwise = isinstance(node.target, torch._ops.OpOverload) and POINTWISE in node.target.tags
    return node if name_of(node) == "cat" or is_pointwise else None


split_concatenations = Fusion("split_concatenations", "products of joined values taken part by part", _rewrite)
"""The pass; the order of the parts is the same in every call of a structure."""
