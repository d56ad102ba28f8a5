"""Which values of a graph are made of normalized heads by moving lanes, joining tokens and multiplying with tables."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.capture.mutations import named_arguments
from xdit_compile.ir.arguments import integer_of, node_of, overload_of, sequence_of
from xdit_compile.passes.memory.on_meta import Shapes, name_of

from .elements import VIEWS
from .lanes import Heads, Move, Rotation, Stretch, Term, added, joined, moved, multiplied, rotation_of

aten = torch.ops.aten
NORMS = {aten.rms_norm.default: "rms", aten.layer_norm.default: "layer"}
SAME = ("_to_copy", "type_as", "clone", "contiguous", "alias", "lift_fresh_copy")


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm of heads.

    Args:
        x: what is normalized.
        kind: as the kernel calls it.
        eps: what is added to the mean square or variance.
        affine: the nodes of weight and bias, as far as there are such.
        lead: the order of the first dims of ``x``, as of `Heads`.
    """

    x: fx.Node
    kind: str
    eps: float
    affine: tuple[fx.Node, ...]
    lead: str


@dataclasses.dataclass(frozen=True)
class TableOf:
    """What values are multiplied with, and the order of their first dims then."""

    node: fx.Node
    lead: str


class HeadValues:
    """The values of a graph that are made of normalized heads.

    Attributes:
        known: these by their nodes, in the order of the graph.
        norms: what each norm normalizes.
        bare: norms that are written out and get their weight later, where they count once more.
        tables: what values are multiplied with, by number.
    """

    def __init__(self, graph: fx.Graph, shapes: Shapes):
        self._shapes = shapes
        self._pieces: dict[fx.Node, Sequence[Heads | None]] = {}
        self.known: dict[fx.Node, Heads] = {}
        self.bare: set[fx.Node] = set()
        self.norms: dict[fx.Node, Norm] = {}
        self.tables: list[TableOf] = []
        for node in graph.nodes:
            if node.op == "call_function":
                heads = self._norm(node) if node.target in NORMS else self._value(node)
                if heads is not None:
                    self.known[node] = heads

    @property
    def cuts(self) -> set[fx.Node]:
        """The nodes that cut such values into others."""
        return {node for node, pieces in self._pieces.items() if all(piece is not None for piece in pieces)}

    def _norm(self, node: fx.Node) -> Heads | None:
        arguments, kind = named_arguments(node), NORMS[overload_of(node)]
        shape = self._shapes[node].shape
        if list(arguments["normalized_shape"]) != list(shape[-1:]) or arguments.get("eps") is None:
            return None
        affine = tuple(arguments[name] for name in ("weight", "bias") if arguments.get(name) is not None)
        unlike = any(self._shapes[each].shape != shape[-1:] for each in affine)
        if unlike or (len(affine) == 1 and arguments.get("bias") is not None):
            return None
        return self._normalized(node, arguments["input"], kind, float(arguments["eps"]), affine)

    def _normalized(
        self, node: fx.Node, x: fx.Node, kind: str, eps: float, affine: tuple[fx.Node, ...]
    ) -> Heads | None:  # fmt: skip
        shape = self._shapes[x].shape
        lead = _lead(x, self._shapes) if len(shape) == 4 else "bt" if len(shape) == 3 else None
        if lead is None:
            return None
        self.norms[node] = Norm(x, kind if len(shape) == 4 else f"{kind}_all", eps, affine, lead)
        terms = (Term.own(shape[len(lead) :]),)
        return Heads(lead, (Stretch(node, 0, shape[lead.index("t")], terms),))

    def _value(self, node: fx.Node) -> Heads | None:
        if node.target is operator.getitem:
            pieces = self._pieces.get(node_of(node.args[0]))
            return None if pieces is None else pieces[integer_of(node.args[1])]
        name, arguments = name_of(node), named_arguments(node)
        if name in ("cat", "stack"):
            return self._together(name, arguments)
        if name in ("mul", "add", "sub"):
            return self._pointwise(node, name, arguments)
        first = next(iter(arguments.values()), None)
        heads = self.known.get(first) if isinstance(first, fx.Node) else None
        if heads is None or first is None:
            return None
        if name in SAME:
            return heads
        if name == "neg":
            return heads.with_terms(lambda each: tuple(dataclasses.replace(t, sign=-t.sign) for t in each.terms))
        if name in VIEWS:
            return self._view(node, heads)
        if name in ("unbind", "split", "split_with_sizes", "chunk"):
            self._pieces[node] = self._cut(node, heads, arguments)
            return None
        if name in ("permute", "transpose"):
            return self._permuted(node, heads, name, arguments)
        if name in ("new_empty", "empty_like"):
            fits = self._shapes[node].shape == self._shapes[first].shape
            return heads.with_terms(lambda each: (Term.nothing(heads.lanes),)) if fits else None
        return self._along(node, heads, name, arguments)

    def _along(self, node: fx.Node, heads: Heads, name: str, arguments: dict[str, Any]) -> Heads | None:
        """Operators that go along one dim."""
        if name == "copy":
            return self.known.get(arguments["src"]) if isinstance(arguments["src"], fx.Node) else None
        if name not in ("slice", "select", "unsqueeze", "squeeze", "slice_scatter") or "dim" not in arguments:
            return None
        rank = len(heads.lead) + len(heads.lanes) + (name == "unsqueeze")
        dim = arguments["dim"] % rank
        if dim >= len(heads.lead):
            here = {**arguments, "dim": dim - len(heads.lead)}
            return self._on_lanes(node, heads, name, here)
        if heads.lead[dim] != "t" or (arguments.get("step") or 1) != 1 or name not in ("slice", "slice_scatter"):
            return None
        start, stop = _range(arguments, heads.tokens)
        if name == "slice":
            return heads.between(start, stop)
        source = self.known.get(arguments["src"])
        around = [heads.between(0, start), source, heads.between(stop, heads.tokens)]
        parts = [each for each in around if each is not None]
        return joined(parts) if source is not None and source.tokens == stop - start else None

    def _on_lanes(self, node: fx.Node, heads: Heads, name: str, arguments: dict[str, Any]) -> Heads | None:
        op: Any = node.target
        rest = {key: value for key, value in list(arguments.items())[1:] if value is not None}
        if name != "slice_scatter":
            return moved([heads], lambda parts: op(parts[0], **rest))
        source = self.known.get(rest.pop("src"))
        if source is None:
            return None
        count = len(source.stretches[0].terms)
        if _is_nothing(heads):
            heads = heads.with_terms(lambda each: (Term.nothing(heads.lanes),) * count)
        return moved([heads, source], lambda parts: op(*parts, **rest))

    def _view(self, node: fx.Node, heads: Heads) -> Heads | None:
        before, after, lead = self._shapes[node_of(node.args[0])].shape, self._shapes[node].shape, len(heads.lead)
        if before[:lead] != after[:lead] or len(after) <= lead:
            return None
        return moved([heads], lambda parts: parts[0].reshape(after[lead:]))

    def _cut(self, node: fx.Node, heads: Heads, arguments: dict[str, Any]) -> Sequence[Heads | None]:
        """The pieces of a value that is cut along a dim."""
        lead, dim = len(heads.lead), (arguments.get("dim") or 0) % (len(heads.lead) + len(heads.lanes))
        results = self._shapes[node]
        if dim >= lead:
            op: Any = node.target
            rest = {**dict(list(arguments.items())[1:]), "dim": dim - lead}
            return [moved([heads], _piece(op, index, rest)) for index in range(len(results))]
        if heads.lead[dim] != "t" or name_of(node) == "unbind":
            return [None] * len(results)
        sizes = [result.shape[dim] for result in results]
        starts = [sum(sizes[:count]) for count in range(len(sizes))]
        return [heads.between(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def _permuted(self, node: fx.Node, heads: Heads, name: str, arguments: dict[str, Any]) -> Heads | None:
        rank, lead = len(heads.lead) + len(heads.lanes), len(heads.lead)
        order = list(range(rank))
        if name == "permute":
            order = [dim % rank for dim in arguments["dims"]]
        else:
            one, other = arguments["dim0"] % rank, arguments["dim1"] % rank
            order[one], order[other] = order[other], order[one]
        if sorted(order[:lead]) != list(range(lead)):
            return None
        lanes = [dim - lead for dim in order[lead:]]
        turned = moved([heads], lambda parts: parts[0].permute(lanes))
        return None if turned is None else Heads("".join(heads.lead[dim] for dim in order[:lead]), turned.stretches)

    def _together(self, name: str, arguments: dict[str, Any]) -> Heads | None:
        values = [self.known.get(each) for each in sequence_of(next(iter(arguments.values())))]
        some = [value for value in values if value is not None]
        if not some or len(some) < len(values):
            return None
        lead = len(some[0].lead)
        dim = (arguments.get("dim") or 0) % (lead + len(some[0].lanes) + (name == "stack"))
        if dim >= lead:
            together: Callable[..., torch.Tensor] = torch.cat if name == "cat" else torch.stack
            return moved(some, lambda parts: together(list(parts), dim - lead))
        return joined(some) if name == "cat" and some[0].lead[dim] == "t" else None

    def _pointwise(self, node: fx.Node, name: str, arguments: dict[str, Any]) -> Heads | None:
        operands = [each for each in (arguments.get("self"), arguments.get("other")) if isinstance(each, fx.Node)]
        if len(operands) < 2 or arguments.get("alpha", 1) != 1:
            return None
        values = [self.known.get(each) for each in operands]
        if name != "mul":
            one, other = values
            return None if one is None or other is None else added(one, other, -1 if name == "sub" else 1)
        heads = next((value for value in values if value is not None), None)
        if heads is None:
            return self._written_out(node)
        if None not in values:
            return None
        factor = operands[values.index(None)]
        if factor not in self._shapes:
            return None
        if self._shapes[factor].shape == heads.lanes:
            return self._weighted(node, heads, factor)
        table = TableOf(factor, heads.lead)
        if table not in self.tables:
            self.tables.append(table)
        return multiplied(heads, self.tables.index(table), self._shapes[factor])

    def _written_out(self, node: fx.Node) -> Heads | None:
        """``x`` over the root of the mean of its squares, written operator by operator."""
        for x, factor in (node.args[:2], node.args[1::-1]):
            added_up = _operand(factor, "rsqrt")
            mean = _operand(added_up, "add")
            square = _operand(mean, "mean")
            squared = _operand(square, "pow")
            if (
                added_up is None
                or mean is None
                or square is None
                or squared is None
                or squared is not _without_copies(x)
            ):
                continue
            eps, exponent = named_arguments(added_up), named_arguments(square)
            along = named_arguments(mean)
            if (
                isinstance(eps.get("other"), float) and eps.get("alpha", 1) == 1 and exponent["exponent"] == 2
                and list(along["dim"]) in ([-1], [self._shapes[mean].dim() - 1]) and along.get("keepdim")
            ):  # fmt: skip
                return self._normalized(node, squared, "rms", eps["other"], ())
        return None

    def _weighted(self, node: fx.Node, heads: Heads, weight: fx.Node) -> Heads | None:
        """A norm that gets its weight, and nothing has happened to it yet."""
        stretch = heads.stretches[0]
        norm = self.norms[stretch.norm]
        tokens = self._shapes[norm.x].shape[heads.lead.index("t")]
        plain = rotation_of(stretch.terms, heads.lanes[-1]) == Rotation() and (stretch.start, stretch.stop) == (
            0,
            tokens,
        )
        if len(heads.stretches) > 1 or norm.affine or not plain or heads.lead != norm.lead:
            return None
        self.bare.add(stretch.norm)
        return self._normalized(node, norm.x, norm.kind.removesuffix("_all"), norm.eps, (weight,))


def _piece(op: Any, index: int, arguments: dict[str, Any]) -> Move:
    """One of the results of an operator on lanes."""
    return lambda parts: op(parts[0], **arguments)[index]


def _operand(node: Any, name: str) -> fx.Node | None:
    """The first operand of a node that calls an operator of this name, but for changes of dtype; None for another."""
    caller = _without_copies(node)
    if caller is None or caller.op != "call_function" or name_of(caller) != name:
        return None
    return _without_copies(caller.args[0])


def _without_copies(node: Any) -> fx.Node | None:
    """What a node has in another dtype or layout."""
    while isinstance(node, fx.Node) and node.op == "call_function" and name_of(node) in SAME:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _is_nothing(heads: Heads) -> bool:
    return all(bool((term.source < 0).all()) for each in heads.stretches for term in each.terms)


def _range(arguments: dict[str, Any], size: int) -> tuple[int, int]:
    start, stop = arguments.get("start") or 0, arguments.get("end")
    start, stop = start + size * (start < 0), size if stop is None else stop + size * (stop < 0)
    return max(0, start), min(stop, size)


def _lead(x: Any, shapes: Shapes) -> str | None:
    """The order of the first dims of heads that were cut from features: batch, tokens and heads, or heads first."""
    swapped = False
    while isinstance(x, fx.Node) and x.op == "call_function":
        name, arguments = name_of(x), named_arguments(x)
        source = next(iter(arguments.values()), None)
        if name in VIEWS and isinstance(source, fx.Node):
            before, after = shapes[source].shape, shapes[x].shape
            if len(after) != 4 or before[:2] != after[:2]:
                return None
            return "bht" if swapped else "bth"
        if name == "transpose" and {arguments["dim0"] % 4, arguments["dim1"] % 4} == {1, 2}:
            swapped = not swapped
        elif not (name == "permute" and list(arguments["dims"]) == [0, 2, 1, 3]) and name not in SAME:
            return None
        else:
            swapped ^= name == "permute"
        x = source
    return None
