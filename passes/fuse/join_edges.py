"""One convolution for the rows at both ends of a shard, where a rank has a neighbour on each side.

A convolution that does not wait for rows of other ranks computes its first and last rows again when these are there:
few rows, for which all of the weight is read, and laid out for the card, once for each end. Joined along the batch both
ends are one operand, made by one op.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
from torch import fx

import xdit_compile.kernels.collectives.halo  # noqa: F401  (registers the op)
from xdit_compile.ir.arguments import node_of, overload_of
from xdit_compile.passes.axes.operators import CONVOLUTIONS
from xdit_compile.passes.memory.on_meta import Shapes, name_of

from .rewriting import Fusion
from .selection import Choice, Chooser, Cost, Found, Site, bytes_of

aten, ops = torch.ops.aten, torch.ops.xdit_compile
FINISH, PUT = ops.halo_finish.default, ops.put_rows.default
ELSEWHERE = "what came is read by something else than one convolution whose rows are put into one result"
OTHER = "the two ends are convolved in unlike ways"
SIZES = "the two ends are unlike in size"
READ = "the result is read before the rows of both ends are put in"


@dataclasses.dataclass(frozen=True)
class _End:
    """Rows that came beside rows that were here, the convolution that reads them, and what puts its result in place."""

    finish: fx.Node
    convolution: fx.Node
    writer: fx.Node

    @property
    def made(self) -> fx.Node:
        """What is written to."""
        return node_of(self.writer.args[0])

    @property
    def before(self) -> bool:
        """Whether it is the first rows of a shard."""
        return bool(self.finish.args[5])


def _rewrite(graph: fx.Graph, shapes: Shapes, chooser: Chooser) -> Found:
    result = Found()
    by_exchange = defaultdict[fx.Node, list[fx.Node]](list)
    for node in graph.find_nodes(op="call_function", target=FINISH):
        by_exchange[node_of(node.args[0])].append(node)
    for finishes in by_exchange.values():
        if len(finishes) < 2:
            continue
        ends = [end for end in map(_end, finishes) if end is not None]
        reason = _apart(ends, shapes) if len(ends) == len(finishes) == 2 else ELSEWHERE
        choice = Choice(reason, "") if reason else chooser.choose(_site(ends, shapes), shapes)
        if result.takes(choice):
            _join(sorted(ends, key=lambda end: not end.before), shapes)
    return result


def _end(finish: fx.Node) -> _End | None:
    readers = [*finish.users]
    if len(readers) != 1 or name_of(readers[0]) not in CONVOLUTIONS or readers[0].args[0] is not finish:
        return None
    writers = [*readers[0].users]
    if len(writers) != 1 or writers[0].target is not PUT or writers[0].args[1] is not readers[0]:
        return None
    return _End(finish, readers[0], writers[0])


def _apart(ends: list[_End], shapes: Shapes) -> str | None:
    """Why two ends stay apart; None where they need not."""
    one, other = ends
    if one.made is not other.made or one.finish.args[2] == 0:
        return ELSEWHERE
    if one.before == other.before or shapes[one.finish].shape != shapes[other.finish].shape:
        return SIZES
    like = [(each.target, each.args[1:], each.kwargs) for each in (one.convolution, other.convolution)]
    if like[0] != like[1]:
        return OTHER
    writers = one.writer, other.writer
    return READ if any(user < max(writers) for user in one.made.users if user not in writers) else None


def _site(ends: list[_End], shapes: Shapes) -> Site:
    """Both ends; what the convolution's operands besides them take is read once in place of twice."""
    finishes, convolutions = [end.finish for end in ends], [end.convolution for end in ends]
    shared = [node for node in convolutions[0].all_input_nodes if node is not finishes[0]]
    around = [node for finish in finishes for node in finish.all_input_nodes]
    inputs = tuple(dict.fromkeys([*around, *shared, *ends[0].made.all_input_nodes]))
    moved = 3 * bytes_of(finishes, shapes) + bytes_of(convolutions, shapes)
    weights = bytes_of(shared, shapes)
    return Site(inputs, (ends[0].made,), Cost(moved + 2 * weights, 4), Cost(moved + weights, 2))


def _join(ends: list[_End], shapes: Shapes) -> None:
    graph, made = ends[0].made.graph, ends[0].made
    finishes = [end.finish for end in ends]
    arriving, _, dim, *_, group = finishes[0].args
    here, firsts, rows, zeros = ([finish.args[position] for finish in finishes] for position in (1, 3, 4, 6))
    places = [end.writer.args[2:] for end in ends]
    batch = shapes[finishes[0]].shape[0]
    with graph.inserting_before(max(end.writer for end in ends)):
        both = graph.call_function(ops.halo_finish_both.default, (arriving, *here, dim, firsts, rows, zeros, group))
        like = ends[0].convolution
        convolved = graph.call_function(overload_of(like), (both, *like.args[1:]), dict(like.kwargs))
        for number, place in enumerate(places):
            piece = graph.call_function(aten.slice.Tensor, (convolved, 0, number * batch, (number + 1) * batch))
            graph.call_function(PUT, (made, piece, *place))
    for end in ends:
        for node in (end.writer, end.convolution, end.finish):
            graph.erase_node(node)


join_edges = Fusion("join_edges", "convolutions of both ends of a rank's rows in place of two each", _rewrite)
"""The pass; which convolutions those are is the same in every call of a structure."""
