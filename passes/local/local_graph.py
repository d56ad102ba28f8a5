"""The graph that one rank runs in place of a captured one, and its values: split, whole, or partial sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

import xdit_compile.kernels.collectives  # noqa: F401  (registers the ops that the graph calls)
import xdit_compile.kernels.put_rows  # noqa: F401  (registers put_rows)
from xdit_compile.errors import PartitionError
from xdit_compile.ir.axes import Axis
from xdit_compile.ir.program import WeightSlice
from xdit_compile.ir.sharding import Sharding

from .stale_exchange import Exchange, runs

aten = torch.ops.aten
SLICE = "slice"
"""Key in the ``meta`` of a node that is a slice, with ``(source, mesh dimension, piece)``."""
ROWS = "rows"
"""Key in the ``meta`` of a node that puts rows in their places, with how many these are."""
MOST_PIECES = 8
"""Positions that fall into at most this many runs are sliced and joined; more are looked up by index."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor on this rank.

    ``split`` maps a mesh dimension to the tensor dim that it splits; over the mesh dimensions in ``partial`` the tensor
    must still be summed.
    """

    node: fx.Node
    axes: Sequence[Axis]
    dtype: torch.dtype
    split: Mapping[str, int] = dataclasses.field(default_factory=dict)
    partial: frozenset[str] = frozenset()

    @property
    def replicated(self) -> bool:
        return not self.split and not self.partial


@dataclasses.dataclass(frozen=True)
class State:
    """A tensor that a graph reads and writes, and that stays from call to call; other ranks' rows of it come by
    ``exchange``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    exchange: Exchange | None = None


class LocalGraph:
    """Builds the graph of one rank; every helper adds nodes and answers with one.

    Args:
        groups: the process group of each mesh dimension that has ranks.
        parts: into how many parts each mesh dimension splits.
    """

    def __init__(self, sharding: Sharding, groups: Mapping[str, str], parts: Mapping[str, int]):
        self.graph = fx.Graph()
        self.sharding = sharding
        self.groups = groups
        self.parts = parts
        self.constants: dict[str, torch.Tensor] = {}
        self.states: list[State] = []
        self._states: dict[str, fx.Node] = {}
        self._pieces: dict[tuple, fx.Node] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator."""
        return self.graph.call_function(target, args, kwargs)

    def constant(self, value: torch.Tensor) -> fx.Node:
        """A tensor that belongs to this graph."""
        name = f"positions_{len(self.constants)}"
        self.constants[name] = value
        return self.graph.get_attr(name)

    def state(self, name: str, shape: Sequence[int], dtype: torch.dtype, exchange: Exchange | None = None) -> fx.Node:
        """A tensor that stays from call to call; the graph takes it after all its other arguments.

        Args:
            name: one name is one state.
            shape: of what this rank has of it.
            exchange: how other ranks' rows of it come; None where they need not.
        """
        if name in self._states:
            return self._states[name]
        self.states.append(State(name, tuple(shape), dtype, exchange))
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            self._states[name] = self.graph.placeholder(name)
        return self._states[name]

    def put(self, state: fx.Node, rows: fx.Node, dim: int, positions: np.ndarray) -> None:
        """Write rows to their ``positions`` along ``dim`` of a state, one for each of the rows."""
        begin = 0
        for start, stop in runs(positions):
            end = begin + stop - start
            piece = rows if end - begin == len(positions) else self.call(aten.slice.Tensor, rows, dim, begin, end)
            written = self.call(torch.ops.xdit_compile.put_rows.default, state, piece, dim, start)
            written.meta[ROWS] = end - begin
            begin = end

    def sizes(self, value: Value) -> list[int]:
        """The shape of a value on this rank."""
        return self.sharding.sizes(value.axes, value.split)

    def take(self, node: fx.Node, dim: int, positions: np.ndarray, size: int) -> fx.Node:
        """``positions`` of a dim that has ``size`` of them here, in the given order."""
        if len(positions) == size and np.array_equal(positions, np.arange(size)):
            return node
        key = (node, dim, positions.tobytes())
        if key not in self._pieces:
            self._pieces[key] = self._take(node, dim, positions)
        return self._pieces[key]

    def _take(self, node: fx.Node, dim: int, positions: np.ndarray) -> fx.Node:
        if len(positions) == 0:
            return self.call(aten.slice.Tensor, node, dim, 0, 0)
        pieces = runs(positions)
        if len(pieces) > MOST_PIECES:
            return self.call(aten.index_select.default, node, dim, self.constant(torch.from_numpy(positions)))
        slices = [self.call(aten.slice.Tensor, node, dim, start, stop) for start, stop in pieces]
        return slices[0] if len(slices) == 1 else self.call(aten.cat.default, slices, dim)

    def slice(self, node: fx.Node, dim: int, axis: Axis, name: str, also: Sequence[str]) -> fx.Node:
        """This rank's positions of a dim that one more mesh dimension splits.

        Args:
            axis: the whole dim's.
            name: the mesh dimension.
            also: those that split the dim already.
        """
        held = self.sharding.positions(axis, also)
        kept = np.flatnonzero(np.isin(held, self.sharding.positions(axis, [*also, name])))
        return self.cut(node, dim, kept, len(held), name)

    def cut(self, node: fx.Node, dim: int, positions: np.ndarray, size: int, name: str) -> fx.Node:
        """What a rank of mesh dimension ``name`` takes of a dim that has ``size`` positions here.

        The node says so, for weights of which only this is kept then.
        """
        taken = self.take(node, dim, positions, size)
        if taken is not node:
            taken.meta[SLICE] = (node, name, WeightSlice(dim, runs(positions)))
        return taken

    def gather(self, node: fx.Node, dim: int, axis: Axis, name: str, also: Sequence[str]) -> tuple[fx.Node, list[int]]:
        """All positions of a dim that a mesh dimension splits, in their true order.

        Args:
            axis: the whole dim's.
            name: the mesh dimension.
            also: others that split the dim too, and go on doing so.

        Returns:
            The node, and how many positions each rank brought.

        Raises:
            PartitionError: where the mesh dimension has no group.
        """
        held = [self.sharding.positions(axis, [*also, name], {name: index}) for index in range(self.parts[name])]
        sizes = [len(positions) for positions in held]
        gathered = self.call(torch.ops.xdit_compile.all_gather.default, node, dim, sizes, self.group(name))
        gathered_positions = np.concatenate(held)
        order = np.argsort(gathered_positions, kind="stable")
        return self.take(gathered, dim, order, len(gathered_positions)), sizes

    def scatter(self, node: fx.Node, dim: int, axis: Axis, name: str, also: Sequence[str]) -> tuple[fx.Node, list[int]]:
        """This rank's positions of a sum over mesh dimension ``name``, as `slice` would take them; also each rank's
        share."""
        held = self.sharding.positions(axis, also)
        ranks = range(self.parts[name])
        kept = [np.flatnonzero(np.isin(held, self.sharding.positions(axis, [*also, name], {name: r}))) for r in ranks]
        sizes = [len(positions) for positions in kept]
        ordered = self.take(node, dim, np.concatenate(kept), len(held))
        scatter = torch.ops.xdit_compile.reduce_scatter.default
        return self.call(scatter, ordered, dim, sizes, self.sharding.index[name], self.group(name)), sizes

    def reduce(self, node: fx.Node, name: str) -> fx.Node:
        """The sum over the ranks of a mesh dimension."""
        return self.call(torch.ops.xdit_compile.all_reduce.default, node, self.group(name), "sum")

    def group(self, name: str) -> str:
        """The process group over which ranks share what a mesh dimension splits.

        Raises:
            PartitionError: patches follow one another in time: nobody else holds the others.
        """
        if name not in self.groups:
            raise PartitionError(f"needs every {name} at once; only keys and values of attention are kept from others")
        return self.groups[name]

    def finish(self, results: Sequence[Any]) -> fx.GraphModule:
        """The module of this graph with ``results``, nodes or None, as its output."""
        self.graph.output(tuple(results))
        self.graph.eliminate_dead_code()
        owner = torch.nn.Module()
        for name, value in self.constants.items():
            owner.register_buffer(name, value, persistent=False)
        return fx.GraphModule(owner, self.graph)
