"""Has the kernel of norms and rotations write, with values, straight into the buffer that an all-to-all sends."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.capture.simplify import erase_with_sources
from xdit_compile.ir.arguments import integer_of, node_of, sequence_of
from xdit_compile.passes.heads.elements import SAME, VIEWS, source
from xdit_compile.passes.memory.on_meta import Shapes, name_of

from .equal_values import EqualValues
from .rewriting import Fusion
from .selection import Choice, Chooser, Cost, Found, Site, bytes_of

aten = torch.ops.aten
PROBES = 256
"""So many elements of a buffer are traced, besides the first and the last of each piece."""
OTHER = "queries and keys go into a buffer of another order"


def _rewrite(graph: fx.Graph, shapes: Shapes, chooser: Chooser) -> Found:
    result, values = Found(), EqualValues(graph)
    for made in graph.find_nodes(op="call_function", target=torch.ops.xdit_compile.norm_rope.default):
        lines = sorted(made.users, key=lambda user: integer_of(user.args[1]))
        buffer = _buffer(lines) if len(lines) == 2 and not made.args[10] else None
        if buffer is None:
            continue
        plain = _plain(buffer, lines, shapes)
        if (
            plain is None
            or any(map(values.is_written, plain.all_input_nodes))
            or not _fits(buffer, [*lines, plain], shapes)
        ):
            result.takes(Choice(OTHER, ""))
            continue
        if not result.takes(chooser.choose(_site(buffer, plain, made, lines, shapes, values), shapes)):
            continue
        with graph.inserting_before(buffer):
            streams = _streams(graph, plain, made, shapes)
            groups = shapes[node_of(buffer.args[0])].shape[0]
            packed = graph.call_function(made.target, (*made.args[:10], streams, groups))
            flat = graph.call_function(operator.getitem, (packed, 0))
        buffer.replace_all_uses_with(flat)
        erase_with_sources(buffer)
    return result


def _site(
    buffer: fx.Node, plain: fx.Node, made: fx.Node, lines: Sequence[fx.Node], shapes: Shapes, values: EqualValues
) -> Site:  # fmt: skip
    """Queries, keys and values on their way into a buffer: by itself a kernel copies what others made."""
    tables, size = bytes_of(made.args[3:5], shapes), shapes[lines[0]].nbytes
    streams = plain.all_input_nodes if name_of(plain) == "cat" else [plain]
    inputs = tuple(dict.fromkeys([*made.all_input_nodes, *streams]))
    apart = Cost((2 * len(lines) + 2 * (len(lines) + 1)) * size + tables, 2)
    return Site(inputs, (buffer,), apart, Cost(2 * (len(lines) + 1) * size + tables, 1), values.first)


def _buffer(lines: Sequence[fx.Node]) -> fx.Node | None:
    """The flat value that is made of lines and nothing but moved elements."""
    node = lines[0]
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op != "call_function" or name_of(node) not in (*SAME, *VIEWS, "permute", "transpose", "cat"):
            return None
        if name_of(node) in VIEWS and list(sequence_of(node.args[1])) == [-1]:
            return node if name_of(node_of(node.args[0])) == "cat" else None
    return None


def _plain(buffer: fx.Node, lines: Sequence[fx.Node], shapes: Shapes) -> fx.Node | None:
    """The third value that goes into a buffer, of the shape of the lines."""
    joined = list(map(node_of, sequence_of(node_of(buffer.args[0]).args[0])))
    if len(joined) != 3:
        return None
    node = joined[2]
    while name_of(node) in (*SAME, *VIEWS, "permute", "transpose"):
        node = node_of(node.args[0])
        if shapes[node].shape == shapes[lines[0]].shape:
            return node
    return None


def _fits(buffer: fx.Node, lines: Sequence[fx.Node], shapes: Shapes) -> bool:
    """Whether elements come to lie as the kernel packs them: the ones at the edges of pieces, and some others."""
    batch, tokens, heads, width = shapes[lines[0]].shape
    groups = shapes[node_of(buffer.args[0])].shape[0]
    if heads % groups or shapes[buffer].numel() != len(lines) * shapes[lines[0]].numel():
        return False
    share = heads // groups
    sizes = (groups, tokens, batch, len(lines), share, width)
    for group, token, sample, line, head, lane in _probes(sizes):
        place = 0
        for size, index in zip(sizes, (group, token, sample, line, head, lane), strict=True):
            place = place * size + index
        if source(buffer, (place,), lines, shapes) != (lines[line], (sample, token, group * share + head, lane)):
            return False
    return True


def _probes(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every corner of a box, and some places inside."""
    for corner in range(2 ** len(sizes)):
        yield tuple((size - 1) * (corner >> bit & 1) for bit, size in enumerate(sizes))
    drawn = random.Random(math.prod(sizes))
    for _ in range(PROBES):
        yield tuple(drawn.randrange(size) for size in sizes)


def _streams(graph: fx.Graph, plain: fx.Node, made: fx.Node, shapes: Shapes) -> list[fx.Node]:
    """The streams of tokens of a value, as the queries have them."""
    parts: list[Any] = list(sequence_of(made.args[0]))[: len(sequence_of(made.args[5]))]
    counts = [_tokens(stream, shapes) for stream in parts]
    if len(counts) == 1:
        return [plain]
    if name_of(plain) == "cat":
        joined = list(map(node_of, sequence_of(plain.args[0])))
        if [_tokens(stream, shapes) for stream in joined] == counts:
            return joined
    starts = [sum(counts[:before]) for before in range(len(counts))]
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    return [graph.call_function(aten.slice.Tensor, (plain, 1, *ends_of)) for ends_of in zip(starts, ends, strict=True)]


def _tokens(stream: fx.Node, shapes: Shapes) -> int:
    return int(shapes[stream].shape[1])


pack_heads = Fusion("pack_heads", "buffers of heads written by the kernel of norms and rotations", _rewrite)
"""The pass; the order of heads in a buffer is the same in every call of a structure."""
