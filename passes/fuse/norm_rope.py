"""One kernel for the norm of queries' and keys' heads, their rotary embedding and the joining of streams of tokens.

Everything between a norm of heads and what reads the rotated values is read in the algebra of `lanes`, whichever way
the rotation is written: with a turned copy, with halves, with writes of every other lane.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.capture.simplify import erase_with_sources
from xdit_compile.ir.arguments import node_of
from xdit_compile.kernels import norm_rope as kernel  # noqa: F401 - registers the op
from xdit_compile.passes.heads.elements import VIEWS
from xdit_compile.passes.heads.head_values import SAME, HeadValues, Norm, TableOf
from xdit_compile.passes.heads.lanes import Heads, Stretch, rotation_of
from xdit_compile.passes.memory.on_meta import Shapes, name_of

from .equal_values import EqualValues
from .rewriting import Fusion
from .selection import Chooser, Cost, Found, Site

aten = torch.ops.aten
OTHER = "what is done with the heads is no rotation"
USED = "a value on the way is used by others, too"
ROUNDED = "the result has another dtype than the heads"
MANY = "more than two streams are joined"
TABLES = "streams are rotated by tables of their own"
ALONE = "there is nothing but the norm"
WRITTEN = "the value is written to"
ODD = "heads have an odd number of lanes"
MANY_ROWS = "there are more heads of tokens than the kernel counts"
MOST_ROWS = 2**30
"""So many heads of tokens one result may have."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A value that the kernel makes, as queries or keys.

    Args:
        end: the node in whose place it comes.
        heads: what it is made of.
        norms: of each stretch of its tokens.
        turned: whether each stretch is rotated.
        halves: whether pairs are lanes of two halves.
        tables: cosines and sines; empty where nothing is rotated.
        key: what lines that one kernel makes have in common.
    """

    end: fx.Node
    heads: Heads
    norms: tuple[Norm, ...]
    turned: tuple[bool, ...]
    halves: bool
    tables: tuple[TableOf, ...]
    key: Any

    @property
    def inputs(self) -> list[fx.Node]:
        """What it is computed of."""
        return [
            *(node for norm in self.norms for node in (norm.x, *norm.affine)),
            *(table.node for table in self.tables),
        ]


def _rewrite(graph: fx.Graph, shapes: Shapes, chooser: Chooser) -> Found:
    result, values, equal = Found(), HeadValues(graph, shapes), EqualValues(graph)
    lines = []
    for end in _ends(values, result):
        line = _line(end, values, shapes, equal)
        if isinstance(line, Line):
            lines.append(line)
        else:
            result.apart[line] += 1
    while lines:
        pair = [lines[0], *[line for line in lines[1:] if line.key == lines[0].key][:1]]
        if _place(graph, pair) is None:
            pair = pair[:1]
        lines = [line for line in lines if line not in pair]
        if result.takes(chooser.choose(_site(pair, shapes, equal), shapes), len(pair)):
            _emit(graph, pair, shapes)
    return result


def _site(lines: Sequence[Line], shapes: Shapes, equal: EqualValues) -> Site:
    """What one kernel makes of lines.

    By itself a norm of one stream is rotated by the kernel that computes it, which makes all lines and loads the lanes
    that are turned once more. Streams that are joined are normalized by a kernel each, and another one for each line
    loads these twice to rotate them; without a rotation they are written to their places. The one kernel loads tables
    for every line.
    """
    made = [shapes[line.end].nbytes for line in lines]
    tables = sum(shapes[table.node].nbytes for table in lines[0].tables)
    moved, launches = tables, 0
    for line, size in zip(lines, made, strict=True):
        turned, streams = any(line.turned), len(line.norms)
        moved += size * (5 if turned and streams > 1 else 2 + turned)
        launches += streams + turned if streams > 1 else 0
    fused = Cost(2 * sum(made) + tables * len(lines), 1)
    inputs = tuple(dict.fromkeys(_features(node) for line in lines for node in line.inputs))
    ends = tuple(line.end for line in lines)
    return Site(inputs, ends, Cost(moved, max(1, launches)), fused, equal.first)


def _features(node: fx.Node) -> fx.Node:
    """What heads are cut from, by which their dims are known; the node itself where it is not cut."""
    source = node
    while source.op == "call_function" and name_of(source) in (*SAME, *VIEWS, "transpose", "permute"):
        is_cut, source = name_of(source) in VIEWS, node_of(source.args[0])
        if is_cut:
            return source
    return node


def _ends(values: HeadValues, result: Found) -> Iterator[fx.Node]:
    """The last value made of each norm of heads, if nothing on the way to it is used by others."""
    families: list[tuple[set[fx.Node], set[fx.Node]]] = []
    for node, heads in values.known.items():
        norms, members = {stretch.norm for stretch in heads.stretches}, {node}
        for family in [family for family in families if family[0] & norms]:
            families.remove(family)
            norms, members = norms | family[0], members | family[1]
        families.append((norms, members))
    for norms, members in families:
        if norms <= values.bare:
            continue
        inside = members | values.cuts
        last = [node for node in values.known if node in members and any(user not in inside for user in node.users)]
        if len(last) == 1 and _is_cut(values.known[last[0]]):
            yield last[0]
        elif any(_is_cut(values.known[node]) for node in members):
            result.apart[USED] += 1


def _is_cut(heads: Heads) -> bool:
    """Whether heads are told apart, and have one dim of lanes each."""
    return len(heads.lead) + len(heads.lanes) == 4 and len(heads.lanes) == 1 + (heads.lead == "bt")


def _line(end: fx.Node, values: HeadValues, shapes: Shapes, equal: EqualValues) -> Line | str:
    """What the kernel makes in the place of a value, or why it does not."""
    heads = values.known[end]
    norms = tuple(values.norms[stretch.norm] for stretch in heads.stretches)
    width = heads.lanes[-1]
    rotations = [each for each in (rotation_of(stretch.terms, width) for stretch in heads.stretches) if each]
    kinds = {(each.kind, each.eps, len(each.affine), each.lead) for each in norms}
    if len(rotations) < len(heads.stretches) or len(kinds) > 1:
        return OTHER
    turned = tuple(each.cos is not None for each in rotations)
    rotated = {each for each in rotations if each.cos is not None}
    if len(heads.stretches) > 2:
        return MANY
    if not rotated and len(heads.stretches) == 1:
        return ALONE
    numbers = [number for each in rotated for number in (each.cos, each.sin) if number is not None]
    tables = tuple(values.tables[number] for number in numbers)
    if len(rotated) > 1 or not _consecutive(heads.stretches, turned, tables, shapes):
        return TABLES
    if len({shapes[end].dtype, *(shapes[norm.x].dtype for norm in norms)}) > 1:
        return ROUNDED
    if width % 2:
        return ODD
    if shapes[end].numel() // width > MOST_ROWS:
        return MANY_ROWS
    if any(equal.is_written(node) for norm in norms for node in (norm.x, *norm.affine)):
        return WRITTEN
    halves = any(each.halves for each in rotated)
    counts = tuple(stretch.count for stretch in heads.stretches)
    key = (
        counts,
        turned,
        halves,
        heads.lead,
        *kinds,
        tuple(equal.first(each.node) for each in tables),
        shapes[end].shape,
    )
    return Line(end, heads, norms, turned, halves, tables, (*key, shapes[end].dtype))


def _consecutive(
    stretches: Sequence[Stretch], turned: Sequence[bool], tables: Sequence[TableOf], shapes: Shapes
) -> bool:  # fmt: skip
    """Whether rotated stretches have the rows of the tables one after the other, from the first to the last."""
    row = 0
    for stretch in (stretch for stretch, is_turned in zip(stretches, turned, strict=True) if is_turned):
        if stretch.row != row:
            return False
        row += stretch.count
    return all(_sizes(table, shapes)[table.lead.index("t")] == row for table in tables)


def _sizes(table: TableOf, shapes: Shapes) -> list[int]:
    """The shape of a table with all four dims."""
    shape = shapes[table.node].shape
    return [*[1] * (4 - len(shape)), *shape]


def _place(graph: fx.Graph, lines: Sequence[Line]) -> fx.Node | None:
    """The node before which all is there that lines are computed of, and none of them is used yet."""
    placeholders = graph.find_nodes(op="placeholder")
    last = max([*placeholders[-1:], *(node for line in lines for node in line.inputs)])
    return last.next if all(user > last for line in lines for user in line.end.users) else None


def _emit(graph: fx.Graph, lines: Sequence[Line], shapes: Shapes) -> None:
    """One call of the kernel for lines, in the place of what made them before."""
    place, first = _place(graph, lines), lines[0]
    assert place is not None
    with graph.inserting_before(place):
        parts = [part for line in lines for part in _parts(graph, line, shapes)]
        affine = [[norm.affine[kind] for line in lines for norm in line.norms if norm.affine[kind:]] for kind in (0, 1)]
        tables: list[Any] = [_table(graph, table, shapes) for table in first.tables] or [None, None]
        norm, turned = first.norms[0], list(map(int, first.turned))
        arguments: tuple[Any, ...] = (
            parts,
            *affine,
            *tables,
            turned,
            norm.kind,
            norm.eps,
            len(lines),
            first.halves,
            [],
            0,
        )
        made = graph.call_function(torch.ops.xdit_compile.norm_rope.default, arguments)
        for position, line in enumerate(lines):
            value = graph.call_function(operator.getitem, (made, position))
            if line.heads.lead not in ("bth", "bt"):
                order = ["bth".index(dim) for dim in line.heads.lead]
                value = graph.call_function(aten.permute.default, (value, [*order, 3]))
            line.end.replace_all_uses_with(value)
    for line in lines:
        erase_with_sources(line.end)


def _parts(graph: fx.Graph, line: Line, shapes: Shapes) -> Iterator[fx.Node]:
    """What a line's stretches normalize, as batch, tokens, heads and lanes."""
    for stretch, norm in zip(line.heads.stretches, line.norms, strict=True):
        x, sizes = norm.x, shapes[norm.x].shape
        if norm.lead == "bht":
            x, sizes = graph.call_function(aten.transpose.int, (x, 1, 2)), sizes[:1] + sizes[2:3] + sizes[1:2]
        if norm.lead == "bt":
            x = graph.call_function(aten.reshape.default, (x, [*sizes[:2], *line.heads.lanes]))
        if stretch.count < sizes[1]:
            x = graph.call_function(aten.slice.Tensor, (x, 1, stretch.start, stretch.stop))
        yield x


def _table(graph: fx.Graph, table: TableOf, shapes: Shapes) -> fx.Node:
    """A table as batch, tokens and lanes."""
    sizes = _sizes(table, shapes)
    batch, tokens = (sizes[table.lead.index(dim)] for dim in "bt")
    lanes = shapes[table.node].numel() // (batch * tokens)
    return graph.call_function(aten.reshape.default, (table.node, [batch, tokens, lanes]))


norm_rope = Fusion("norm_rope", "values of heads made by one kernel from the product on", _rewrite)
"""The pass; what heads are made of is the same in every call of a structure."""
