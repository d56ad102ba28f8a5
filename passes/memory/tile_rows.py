"""Runs convolutions in strips of rows, so that what they are made from is never there as a whole.

A large autoencoder takes most memory where an activation is normalised, activated, enlarged or padded, and then
convolved: each step holds a tensor of the same size. Between the activation and the convolution's result every row
depends on a few rows alone, so these steps are done for a strip of rows at a time and the strips of the result are
written to their place. Rows at the seams are computed twice; the result is the same.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import xdit_compile.kernels.put_rows  # noqa: F401  (registers the op that the graphs call)
from xdit_compile.ir.arguments import integer_of, node_of, number_of, sequence_of
from xdit_compile.ir.peak_memory import with_reserve
from xdit_compile.ir.program import Program
from xdit_compile.kernels.collectives.row_exchange import RowExchange
from xdit_compile.passes.local.local_graph import aten
from xdit_compile.passes.lowering.norm import columns, moments_in_pieces
from xdit_compile.passes.rules.convolution import per_dim

from .on_meta import HOST, Shapes, name_of, peak_of, shapes_of
from .row_regions import EXCHANGE, is_zero_pad, regions_of, sources_of

MOST_STRIPS = 16
LEAST_GAIN = 0.02
"""Twice as many strips must lower the peak by this part, or no more are tried."""
SMALL = 16
"""A region whose tensors together take less than this part of the budget is left alone."""
PARAMETERS = ("bias", "stride", "padding", "dilation", "groups")


def in_strips(program: Program, budget: int, device: torch.device = HOST) -> Program:
    """The program with as many strips as it takes to stay within ``budget`` bytes of a device; the fewest do.

    Where no number is enough, the best is taken and a warning says what it needs.
    """
    best, least = program, _needed(program, device)
    if least <= budget:
        return program
    count, shapes = 2, shapes_of(program)
    while count <= MOST_STRIPS:
        cut = _cut(program, shapes, count, budget // SMALL)
        peak = _needed(cut, device)
        if peak <= budget:
            return cut
        if peak > (1 - LEAST_GAIN) * least:
            break
        best, least = cut, peak
        count *= 2
    warnings.warn(
        f"vae_memory is {budget / 2**20:.0f} MiB but this rank needs {least / 2**20:.0f} MiB even in strips; "
        "use more ranks, or the autoencoder's enable_tiling()",
        stacklevel=2,
    )
    return best


def _needed(program: Program, device: torch.device) -> int:
    return with_reserve(peak_of(program, device), device)


def cut_into(program: Program, count: int, least_bytes: int) -> Program:
    """The program with every region of more than ``least_bytes`` cut into ``count`` strips."""
    return _cut(program, shapes_of(program), count, least_bytes)


def _cut(program: Program, shapes: Shapes, count: int, least_bytes: int) -> Program:
    modules = {
        name: _Cutter(structure, shapes, count, least_bytes).run() for name, structure in program.structures().items()
    }
    return dataclasses.replace(program, root=fx.GraphModule(modules, program.root.graph))


class _Cutter:
    """Copies a structure, with every region that matters in strips."""

    def __init__(self, structure: fx.GraphModule, shapes: Shapes, count: int, least_bytes: int):
        self.structure, self.shapes, self.count = structure, shapes, count
        self.regions = [region for region in regions_of(structure.graph, shapes) if region.bytes > least_bytes]
        self.inner = {node for region in self.regions for node in region.nodes}
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.arrived: dict[fx.Node, tuple[fx.Node | None, fx.Node | None]] = {}
        self.columns: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def run(self) -> fx.GraphModule:
        if not self.regions:
            return self.structure
        ends = {region.convolution for region in self.regions}
        for node in self.structure.graph.nodes:
            if node in self.inner:
                self._prepare(node)
            elif node in ends:
                self.copies[node] = self._convolution(node)
            elif node.op == "output":
                self.graph.output(fx.node.map_arg(node.args[0], self.copies.__getitem__))
            else:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return fx.GraphModule(self.structure, self.graph)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _prepare(self, node: fx.Node) -> None:
        """What a node needs once, not in every strip: rows of other ranks, statistics."""
        if node.target is EXCHANGE:
            self.arrived[node] = self._exchanged(node)
        elif name_of(node) == "group_norm":
            self.columns[node] = self._statistics(node)

    def _exchanged(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The rows of other ranks before and after this one's own; these ask for some of which strips are made."""
        source, rows = node_of(node.args[0]), RowExchange.of(*sequence_of(node.args[1:]))
        shape = list(self.shapes[source].shape)
        row, (start, _) = math.prod(shape) // shape[-2], rows.own
        sent, got, here = rows.sent, rows.got, rows.index
        pieces = [
            self.call(aten.reshape.default, self.rows(source, a - start, b - start), [-1]) for a, b in sent if b > a
        ]
        if not pieces:
            pieces = [self._nothing(source)]
        away = self.call(aten.cat.default, pieces)
        ins, outs = ([(b - a) * row for a, b in each] for each in (sent, got))
        flat = self.call(torch.ops.xdit_compile.all_to_all.default, away, outs, ins, rows.group)
        sides = []
        for ranks in (range(here), range(here, len(got))):
            parts = []
            for rank in ranks:
                if outs[rank]:
                    at = sum(outs[:rank])
                    piece = self.call(aten.slice.Tensor, flat, 0, at, at + outs[rank])
                    count = got[rank][1] - got[rank][0]
                    parts.append(self.call(aten.reshape.default, piece, [*shape[:-2], count, shape[-1]]))
            sides.append(self._joined(parts) if parts else None)
        return sides[0], sides[1]

    def _nothing(self, node: fx.Node) -> fx.Node:
        """An empty flat tensor of the dtype of a node that is not there as a whole."""
        like = next(iter(self.copies.values()))
        return self.call(aten.new_empty.default, like, [0], dtype=self.shapes[node].dtype)

    def _joined(self, pieces: Sequence[fx.Node]) -> fx.Node:
        return pieces[0] if len(pieces) == 1 else self.call(aten.cat.default, list(pieces), -2)

    def _statistics(self, norm: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What a group norm multiplies and adds; what it normalises is no part of the region."""
        groups, *rest = integer_of(norm.args[1]), *norm.args[2:]
        inputs = node_of(norm.args[0])
        value = self.shapes[inputs]
        wide = torch.promote_types(value.dtype, torch.float32)
        affine = [rest[at] if len(rest) > at else None for at in range(2)]
        epsilon = rest[2] if len(rest) > 2 else norm.kwargs.get("eps", 1e-5)
        sizes, count = list(value.shape), value.numel() // (value.shape[0] * groups)
        flat = self.call(aten.reshape.default, self.copies[inputs], [sizes[0], groups, count])
        mean, squares = moments_in_pieces(self.call, flat, count, value.dtype, wide, self.count)
        variance = self.call(aten.div.Scalar, squares, count)
        factors = [
            self._cast(self.copies[each], self.shapes[each].dtype, wide) if isinstance(each, fx.Node) else None
            for each in affine
        ]
        return columns(self.call, sizes, groups, (mean, variance), factors, number_of(epsilon))

    def _cast(self, node: fx.Node, dtype: torch.dtype, wanted: torch.dtype) -> fx.Node:
        return node if dtype == wanted else self.call(aten._to_copy.default, node, dtype=wanted)

    def _convolution(self, node: fx.Node) -> fx.Node:
        """The strips of a convolution's result, each written to its place."""
        result = self.shapes[node]
        named: dict[str, Any] = dict(zip(PARAMETERS, (None, 1, 0, 1, 1), strict=True))
        named.update(dict(zip(PARAMETERS, node.args[2:], strict=False)))
        kernel = self.shapes[node_of(node.args[1])].shape[2:]
        stride, padding, dilation = (per_dim(named[name], len(kernel)) for name in PARAMETERS[1:4])
        reach, step, above = dilation[-2] * (kernel[-2] - 1) + 1, stride[-2], padding[-2]
        padding[-2] = 0
        weight, bias = (
            self.copies[each] if isinstance(each, fx.Node) else None for each in (node.args[1], named["bias"])
        )
        out = None
        total = result.shape[-2]
        bounds = [round(total * k / self.count) for k in range(self.count + 1)]
        for first, last in zip(bounds, bounds[1:], strict=False):
            if last > first:
                low = first * step - above
                rows = self._padded(node_of(node.args[0]), low, (last - 1) * step + reach - above)
                strip = self.call(node.target, rows, weight, bias, stride, padding, dilation, named["groups"])
                if out is None:
                    out = self.call(aten.new_empty.default, strip, list(result.shape))
                self.call(torch.ops.xdit_compile.put_rows.default, out, strip, result.dim() - 2, first)
        assert out is not None
        return out

    def _padded(self, node: fx.Node, low: int, high: int, others: Sequence[int] = ()) -> fx.Node:
        """Rows ``low`` to ``high`` of a node, zeros where there are none; ``others`` says what to pad of other dims."""
        size = self.shapes[node].shape[-2]
        amounts = list(others) or [0, 0, 0, 0]
        first, last = max(low, 0), min(high, size)
        if last <= first:
            first = last = min(max(low, 0), size)
            amounts[2:4] = [high - low, 0]
        else:
            amounts[2:4] = [first - low, high - last]
        rows = self.rows(node, first, last)
        return self.call(aten.constant_pad_nd.default, rows, amounts, 0.0) if any(amounts) else rows

    def rows(self, node: fx.Node, first: int, last: int) -> fx.Node:
        """Rows ``first`` to ``last`` of what a node yields on this rank."""
        if node not in self.inner:
            whole = self.copies[node]
            complete = (first, last) == (0, self.shapes[node].shape[-2])
            return whole if complete else self.call(aten.slice.Tensor, whole, self.shapes[node].dim() - 2, first, last)
        name, value = name_of(node), self.shapes[node]
        if node.target is EXCHANGE:
            return self._seen(node, first, last)
        if name == "group_norm":
            return self._normalised(node, self.rows(node_of(node.args[0]), first, last))
        if is_zero_pad(node):
            amounts = [*sequence_of(node.args[1]), 0, 0, 0, 0]
            above = amounts[2]
            return self._padded(node_of(node.args[0]), first - above, last - above, amounts[: 2 * value.dim()])
        if "upsample" in name:
            return self._enlarged(node, first, last)
        sources = set(sources_of(node, self.shapes))
        taken = {
            each: self.rows(each, first, last) if each in sources else self.copies[each]
            for each in node.all_input_nodes
        }
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), taken.__getitem__)
        return self.call(node.target, *args, **kwargs)

    def _seen(self, node: fx.Node, first: int, last: int) -> fx.Node:
        """Rows of what an exchange gives: of other ranks, this rank's own, of other ranks again."""
        source, rows = node_of(node.args[0]), RowExchange.of(*sequence_of(node.args[1:]))
        start, (base, end) = rows.wanted[0], rows.own
        low, high = first + start, last + start
        before, after = self.arrived[node]
        dim, pieces = self.shapes[node].dim() - 2, []
        if before is not None and low < base:
            pieces.append(self.call(aten.slice.Tensor, before, dim, low - start, min(high, base) - start))
        if min(high, end) > max(low, base):
            pieces.append(self.rows(source, max(low, base) - base, min(high, end) - base))
        if after is not None and high > end:
            offset = max(end, start)
            pieces.append(self.call(aten.slice.Tensor, after, dim, max(low, end) - offset, high - offset))
        return self._joined(pieces) if pieces else self.rows(source, 0, 0)

    def _enlarged(self, node: fx.Node, first: int, last: int) -> fx.Node:
        source = node_of(node.args[0])
        shape = list(self.shapes[node].shape)
        factor = shape[-2] // self.shapes[source].shape[-2]
        low, high = first // factor, -(-last // factor)
        shape[-2] = (high - low) * factor
        scales = list(node.args[2:])
        if scales:
            scales[-2] = None
        made = self.call(node.target, self.rows(source, low, high), shape[2:], *scales)
        if (low * factor, high * factor) == (first, last):
            return made
        return self.call(aten.slice.Tensor, made, len(shape) - 2, first - low * factor, last - low * factor)

    def _normalised(self, node: fx.Node, rows: fx.Node) -> fx.Node:
        return self.call(torch.ops.xdit_compile.scale_shift.default, rows, *self.columns[node])
