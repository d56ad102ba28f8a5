"""Adds the bias of a convolution after rows of its result were put right, so that whoever reads the result adds it.

A convolution that does not wait for rows of other ranks has its first and last rows written again when these are there.
Adding a bias is a pass over the whole result for a card; between the convolution and what is written to it nothing else
can make that pass, behind it the norm or activation that reads the result does.
"""

from __future__ import annotations

import torch
from torch import fx

from xdit_compile.ir.arguments import node_of
from xdit_compile.passes.axes.operators import CONVOLUTIONS
from xdit_compile.passes.memory.on_meta import Shapes, name_of

from .rewriting import Fusion
from .selection import Choice, Chooser, Cost, Found, Site, bytes_of

aten = torch.ops.aten
PUT = torch.ops.xdit_compile.put_rows.default
OTHER = "rows are put in that another bias, or none, was added to"
READ = "the result is read before all rows are put in"


def _rewrite(graph: fx.Graph, shapes: Shapes, chooser: Chooser) -> Found:
    result = Found()
    for node in [node for node in graph.nodes if _bias(node) is not None]:
        writers = [user for user in node.users if user.target is PUT and user.args[0] is node]
        if not writers:
            continue
        rows = [node_of(writer.args[1]) for writer in writers]
        reason = _apart(node, writers, rows)
        choice = Choice(reason, "") if reason else chooser.choose(_site(node, rows, shapes), shapes)
        if result.takes(choice):
            _add_behind(node, writers, rows, shapes)
    return result


def _bias(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or name_of(node) not in CONVOLUTIONS or len(node.args) < 3:
        return None
    return node.args[2] if isinstance(node.args[2], fx.Node) else None


def _apart(node: fx.Node, writers: list[fx.Node], rows: list[fx.Node]) -> str | None:
    """Why a convolution keeps its bias; None where it need not."""
    if any(_bias(each) is not _bias(node) or len(each.users) > 1 for each in rows):
        return OTHER
    return READ if any(user < max(writers) for user in node.users if user not in writers) else None


def _site(node: fx.Node, rows: list[fx.Node], shapes: Shapes) -> Site:
    """A convolution, and the rows that are put into its result."""
    inputs = tuple(dict.fromkeys(operand for each in (node, *rows) for operand in each.all_input_nodes))
    read, made = bytes_of(inputs, shapes), shapes[node].nbytes
    return Site(inputs, (node,), Cost(read + 3 * made, 2 + len(rows)), Cost(read + made, 1 + len(rows)))


def _add_behind(node: fx.Node, writers: list[fx.Node], rows: list[fx.Node], shapes: Shapes) -> None:
    graph, bias = node.graph, node_of(node.args[2])
    readers = [user for user in node.users if user not in writers]
    for each in (node, *rows):
        each.args = (*each.args[:2], None, *each.args[3:])
    with graph.inserting_after(max(writers)):
        added = graph.call_function(aten.add.Tensor, (node, bias))
    with graph.inserting_before(added):
        column = graph.call_function(aten.reshape.default, (bias, [-1, *[1] * (shapes[node].dim() - 2)]))
    added.args = (node, column)
    for reader in readers:
        reader.replace_input_with(node, added)


late_biases = Fusion("late_biases", "biases added behind rows of other ranks", _rewrite)
"""The pass; which convolutions those are is the same in every call of a structure."""
