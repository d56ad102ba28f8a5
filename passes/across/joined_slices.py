"""Values that are cut and put together again: what they are made of is taken in their place."""

from __future__ import annotations

import itertools

import torch
from torch import fx

from xdit_compile.capture.mutations import written_arguments
from xdit_compile.ir.arguments import integer_of, node_of, sequence_of
from xdit_compile.passes.memory.on_meta import Shapes

from .heads import is_movable

aten = torch.ops.aten


def join_slices(graph: fx.Graph, shapes: Shapes) -> None:
    """Take a value itself where all of it is put together out of slices, and a part where a slice is just that part.

    Compiled, the one would be a copy of the value, and the other a kernel that reads what another one wrote.

    A graph that writes to a value stays as it is, and an argument is not given on as a result.

    Args:
        shapes: what nodes yield, as far as it is known.
    """
    if any(map(written_arguments, graph.nodes)):
        return
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        whole = _whole(node, shapes)
        if whole is not None and whole.op != "placeholder":
            node.replace_all_uses_with(whole)
            erase_unread(node)
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        part = _part(node, shapes)
        if part is not None and part.op != "placeholder":
            node.replace_all_uses_with(part)
            erase_unread(node)


def erase_unread(node: fx.Node) -> None:
    """Erase a node that nobody reads, then what it read, as far as that is of a kind that heads are made of."""
    if node.users or not is_movable(node):
        return
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        erase_unread(source)


def _whole(joined: fx.Node, shapes: Shapes) -> fx.Node | None:
    """The value whose slices, one behind the other, are put together to all of it."""
    pieces = [node_of(each) for each in sequence_of(joined.args[0])]
    if not all(each.target is aten.slice.Tensor and len(each.args) == 4 for each in pieces):
        return None
    source, shape = node_of(pieces[0].args[0]), shapes.get(node_of(pieces[0].args[0]))
    dim = _dim(joined, 1, shape)
    if shape is None or any(each.args[0] is not source or _dim(each, 1, shape) != dim for each in pieces):
        return None
    ends = [0, *(integer_of(each.args[3]) for each in pieces)]
    starts = [integer_of(each.args[2]) for each in pieces]
    return source if starts == ends[:-1] and ends[-1] >= shape.shape[dim] else None


def _part(cut: fx.Node, shapes: Shapes) -> fx.Node | None:
    """The value of several that were put together which a slice takes, and nothing else."""
    joined = node_of(cut.args[0])
    if joined.target is not aten.cat.default or len(cut.args) != 4:
        return None
    pieces = [node_of(each) for each in sequence_of(joined.args[0])]
    values = [shapes[each] for each in pieces if each in shapes]
    if len(values) < len(pieces) or _dim(joined, 1, values[0]) != _dim(cut, 1, values[0]):
        return None
    ends = list(itertools.accumulate(each.shape[_dim(cut, 1, values[0])] for each in values))
    taken = integer_of(cut.args[2]), min(integer_of(cut.args[3]), ends[-1])
    return next((each for each, *bounds in zip(pieces, [0, *ends], ends, strict=False) if tuple(bounds) == taken), None)


def _dim(node: fx.Node, position: int, value: torch.Tensor | None) -> int:
    """The dim that is an argument of a node, counted from the front; the first where none is said."""
    dim = integer_of(node.args[position]) if len(node.args) > position else 0
    return dim % value.dim() if value is not None else dim
