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
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

import xdit_compile.kernels.put_rows  # noqa: F401  (registers the op that the graphs call)
from xdit_compile.ir.arguments import integer_of, node_of, number_of, overload_of, sequence_of
from xdit_compile.ir.inline_calls import flatten
from xdit_compile.ir.peak_memory import peak_bytes, with_reserve
from xdit_compile.ir.program import Program
from xdit_compile.kernels.collectives.row_exchange import RowExchange
from xdit_compile.passes.axes.rule import operator_name
from xdit_compile.passes.local.local_graph import aten
from xdit_compile.passes.lowering.norm import columns, moments_in_pieces
from xdit_compile.passes.rules.convolution import per_dim

MOST_STRIPS = 16
LEAST_GAIN = 0.02
"""Twice as many strips must lower the peak by this part, or no more are tried."""
SMALL = 16
"""A region whose tensors together take less than this part of the budget is left alone."""
CONVOLUTIONS = ("conv2d", "conv3d")
PARAMETERS = ("bias", "stride", "padding", "dilation", "groups")
EXCHANGE = torch.ops.xdit_compile.halo_exchange.default
Shapes = Mapping[fx.Node, torch.Tensor]


HOST = torch.device("cpu")


def in_strips(program: Program, budget: int, device: torch.device = HOST) -> Program:
    """The program with as many strips as it takes to stay within ``budget`` bytes of a device; the fewest do.

    Where no number is enough, the best is taken and a warning says what it needs.
    """
    found, least = program, _needed(program, device)
    if least <= budget:
        return program
    count, shapes = 2, _shapes(program)
    while count <= MOST_STRIPS:
        cut = _cut(program, shapes, count, budget // SMALL)
        peak = _needed(cut, device)
        if peak <= budget:
            return cut
        if peak > (1 - LEAST_GAIN) * least:
            break
        found, least = cut, peak
        count *= 2
    warnings.warn(
        f"vae_memory is {budget / 2**20:.0f} MiB but this rank needs {least / 2**20:.0f} MiB even in strips; "
        "use more ranks, or the autoencoder's enable_tiling()",
        stacklevel=2,
    )
    return found


def _needed(program: Program, device: torch.device) -> int:
    return with_reserve(peak_of(program, device), device)


def peak_of(program: Program, device: torch.device = HOST) -> int:
    """Bytes of activations that a program holds at one time when its operators run one by one.

    On an accelerator those of a convolution's workspace are among them: its library computes in another layout of
    memory than PyTorch's, and copies what it is given and what it gives.
    """
    kind = _OnMeta if device.type in ("cpu", "meta") else _WithWorkspaces
    with torch.no_grad():
        return peak_bytes(kind(flatten(program.root)).run, *_metas(program))


class _OnMeta(fx.Interpreter):
    """Runs a graph on the meta device, where attention would be taken apart and make scores that no kernel keeps."""

    def run_node(self, node: fx.Node) -> Any:
        if _name(node) == "scaled_dot_product_attention":
            query, value = (self.env[node_of(node.args[at])] for at in (0, 2))
            return _laid_out((*query.shape[:-1], value.shape[-1]), node.meta.get("val", query), query)
        if node.op == "get_attr":
            return super().run_node(node).to("meta")
        if "device" in node.kwargs:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            return overload_of(node)(*args, **{**kwargs, "device": torch.device("meta")})
        return super().run_node(node)


class _WithWorkspaces(_OnMeta):
    """The same, with the room beside each convolution for its operand and its result once more."""

    def run_node(self, node: fx.Node) -> Any:
        found = super().run_node(node)
        if "conv" in _name(node):
            count = self.env[node_of(node.args[0])].nbytes + found.nbytes
            torch.empty(count, dtype=torch.uint8, device="meta")
        return found


def _laid_out(shape: Sequence[int], like: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """An empty tensor whose dims lie in memory in the order of another's: graphs have views that count on it."""
    order = sorted(range(like.dim()), key=lambda dim: -like.stride()[dim])
    return torch.empty_permuted(shape, order, dtype=given.dtype, device=given.device)


def _metas(program: Program) -> list[torch.Tensor]:
    values = [node.meta["val"] for node in program.root.graph.find_nodes(op="placeholder")]
    shapes = [given.sizes(value.shape) for given, value in zip(program.inputs, values, strict=True)]
    return [torch.empty(shape, dtype=value.dtype, device="meta") for shape, value in zip(shapes, values, strict=True)]


def cut_into(program: Program, count: int, least_bytes: int) -> Program:
    """The program with every region of more than ``least_bytes`` cut into ``count`` strips."""
    return _cut(program, _shapes(program), count, least_bytes)


def _cut(program: Program, shapes: Shapes, count: int, least_bytes: int) -> Program:
    modules = {
        name: _Cutter(structure, shapes, count, least_bytes).run() for name, structure in program.structures().items()
    }
    return dataclasses.replace(program, root=fx.GraphModule(modules, program.root.graph))


def _shapes(program: Program) -> Shapes:
    """What every node of every structure yields, on the meta device."""
    found: dict[fx.Node, torch.Tensor] = {}

    class Recorder(_OnMeta):
        def run_node(self, node: fx.Node) -> Any:
            if node.op == "call_module":
                args, _ = self.fetch_args_kwargs_from_env(node)
                return Recorder(getattr(program.root, str(node.target))).run(*args)
            found[node] = super().run_node(node)
            return found[node]

    with torch.no_grad():
        Recorder(program.root).run(*_metas(program))
    return found


@dataclasses.dataclass(frozen=True)
class Region:
    """A convolution and the nodes before it of which every row depends on a few rows of what stands before them."""

    convolution: fx.Node
    nodes: frozenset[fx.Node]
    bytes: int


def _regions(graph: fx.Graph, shapes: Shapes) -> list[Region]:
    found = []
    for node in graph.nodes:
        if _name(node) in CONVOLUTIONS and shapes[node].dim() >= 4 and shapes[node].numel():
            nodes = frozenset(_behind(node, shapes))
            if nodes:
                found.append(Region(node, nodes, sum(_bytes(shapes[inner]) for inner in nodes)))
    return found


def _behind(convolution: fx.Node, shapes: Shapes) -> list[fx.Node]:
    found, pending = [], [convolution.args[0]]
    while pending:
        node = pending.pop()
        if isinstance(node, fx.Node) and len(node.users) == 1 and (sources := _sources(node, shapes)):
            found.append(node)
            pending += sources if _name(node) != "group_norm" else []
    return found


def _sources(node: fx.Node, shapes: Shapes) -> list[fx.Node]:
    """The operands of which a row-wise operator takes rows; none where it is not row-wise, or has one row."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(shapes[node], torch.Tensor):
        return []
    name, value, own = _name(node), shapes[node], node.all_input_nodes
    if value.dim() < 4 or value.shape[-2] < 2 or not value.numel():
        return []
    if name == "cat":
        inner = integer_of(node.args[1] if len(node.args) > 1 else 0) % value.dim() != value.dim() - 2
        return own if inner and all(shapes[each].dim() == value.dim() for each in own) else []
    if name == "group_norm" or node.target is EXCHANGE and node.args[1] == value.dim() - 2 or _is_zero_pad(node):
        return [node_of(node.args[0])]
    if "upsample_nearest" in name and name.endswith(("2d", "3d")):
        given = node_of(node.args[0])
        return [given] if value.shape[-2] % shapes[given].shape[-2] == 0 else []
    if torch.Tag.pointwise in node.target.tags or name in ("_to_copy", "clone"):
        long = [each for each in own if shapes[each].dim() > 1 and shapes[each].shape[-2] == value.shape[-2]]
        return long if all(shapes[each].dim() == value.dim() for each in long) else []
    return []


def _is_zero_pad(node: fx.Node) -> bool:
    name = _name(node)
    if name not in ("pad", "constant_pad_nd"):
        return False
    at = 3 if name == "pad" else 2
    value = node.args[at] if len(node.args) > at else node.kwargs.get("value")
    constant = name != "pad" or len(node.args) < 3 or node.args[2] == "constant"
    return constant and not value and min(sequence_of(node.args[1])) >= 0


def _name(node: fx.Node) -> str:
    return operator_name(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


class _Cutter:
    """Copies a structure, with every region that matters in strips."""

    def __init__(self, structure: fx.GraphModule, shapes: Shapes, count: int, least_bytes: int):
        self.structure, self.shapes, self.count = structure, shapes, count
        self.regions = [region for region in _regions(structure.graph, shapes) if region.bytes > least_bytes]
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
        elif _name(node) == "group_norm":
            self.columns[node] = self._statistics(node)

    def _exchanged(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """The rows of other ranks before and after this one's own; these ask for some of which strips are made."""
        given, rows = node_of(node.args[0]), RowExchange.of(*sequence_of(node.args[1:]))
        shape = list(self.shapes[given].shape)
        row, (start, _) = math.prod(shape) // shape[-2], rows.own
        sent, got, here = rows.sent, rows.got, rows.index
        pieces = [
            self.call(aten.reshape.default, self.rows(given, a - start, b - start), [-1]) for a, b in sent if b > a
        ]
        if not pieces:
            pieces = [self._nothing(given)]
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
        given = [
            self._cast(self.copies[each], self.shapes[each].dtype, wide) if isinstance(each, fx.Node) else None
            for each in affine
        ]
        return columns(self.call, sizes, groups, (mean, variance), given, number_of(epsilon))

    def _cast(self, node: fx.Node, dtype: torch.dtype, wanted: torch.dtype) -> fx.Node:
        return node if dtype == wanted else self.call(aten._to_copy.default, node, dtype=wanted)

    def _convolution(self, node: fx.Node) -> fx.Node:
        """The strips of a convolution's result, each written to its place."""
        result = self.shapes[node]
        given: dict[str, Any] = dict(zip(PARAMETERS, (None, 1, 0, 1, 1), strict=True))
        given.update(dict(zip(PARAMETERS, node.args[2:], strict=False)))
        kernel = self.shapes[node_of(node.args[1])].shape[2:]
        stride, padding, dilation = (per_dim(given[name], len(kernel)) for name in PARAMETERS[1:4])
        reach, step, above = dilation[-2] * (kernel[-2] - 1) + 1, stride[-2], padding[-2]
        padding[-2] = 0
        weight, bias = (
            self.copies[each] if isinstance(each, fx.Node) else None for each in (node.args[1], given["bias"])
        )
        out = None
        total = result.shape[-2]
        bounds = [round(total * k / self.count) for k in range(self.count + 1)]
        for first, last in zip(bounds, bounds[1:], strict=False):
            if last > first:
                low = first * step - above
                rows = self._padded(node_of(node.args[0]), low, (last - 1) * step + reach - above)
                strip = self.call(node.target, rows, weight, bias, stride, padding, dilation, given["groups"])
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
        name, value = _name(node), self.shapes[node]
        if node.target is EXCHANGE:
            return self._seen(node, first, last)
        if name == "group_norm":
            return self._normalised(node, self.rows(node_of(node.args[0]), first, last))
        if _is_zero_pad(node):
            amounts = [*sequence_of(node.args[1]), 0, 0, 0, 0]
            above = amounts[2]
            return self._padded(node_of(node.args[0]), first - above, last - above, amounts[: 2 * value.dim()])
        if "upsample" in name:
            return self._enlarged(node, first, last)
        sources = set(_sources(node, self.shapes))
        taken = {
            each: self.rows(each, first, last) if each in sources else self.copies[each]
            for each in node.all_input_nodes
        }
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), taken.__getitem__)
        return self.call(node.target, *args, **kwargs)

    def _seen(self, node: fx.Node, first: int, last: int) -> fx.Node:
        """Rows of what an exchange gives: of other ranks, this rank's own, of other ranks again."""
        given, rows = node_of(node.args[0]), RowExchange.of(*sequence_of(node.args[1:]))
        start, (base, end) = rows.wanted[0], rows.own
        low, high = first + start, last + start
        before, after = self.arrived[node]
        dim, pieces = self.shapes[node].dim() - 2, []
        if before is not None and low < base:
            pieces.append(self.call(aten.slice.Tensor, before, dim, low - start, min(high, base) - start))
        if min(high, end) > max(low, base):
            pieces.append(self.rows(given, max(low, base) - base, min(high, end) - base))
        if after is not None and high > end:
            offset = max(end, start)
            pieces.append(self.call(aten.slice.Tensor, after, dim, max(low, end) - offset, high - offset))
        return self._joined(pieces) if pieces else self.rows(given, 0, 0)

    def _enlarged(self, node: fx.Node, first: int, last: int) -> fx.Node:
        given = node_of(node.args[0])
        shape = list(self.shapes[node].shape)
        factor = shape[-2] // self.shapes[given].shape[-2]
        low, high = first // factor, -(-last // factor)
        shape[-2] = (high - low) * factor
        scales = list(node.args[2:])
        if scales:
            scales[-2] = None
        made = self.call(node.target, self.rows(given, low, high), shape[2:], *scales)
        if (low * factor, high * factor) == (first, last):
            return made
        return self.call(aten.slice.Tensor, made, len(shape) - 2, first - low * factor, last - low * factor)

    def _normalised(self, node: fx.Node, rows: fx.Node) -> fx.Node:
        return self.call(torch.ops.xdit_compile.scale_shift.default, rows, *self.columns[node])
