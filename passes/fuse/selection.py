"""Whether a place is rewritten: by what was measured of it on this device, else by what it would move and launch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import fx

from xdit_compile.cache.graphs import canonical
from xdit_compile.cache.unportable import Unportable
from xdit_compile.cache.values import digest_of
from xdit_compile.capture.mutations import Memory, written_arguments
from xdit_compile.ir.subgraph import reached
from xdit_compile.passes.memory.on_meta import Shapes, name_of

from .timings import Timing, Timings

MORE = "it would move no less and launch no fewer kernels"
UNTIMED = "it is fused only where that was timed"
TIMED, ESTIMATED = "timing", "estimate"


class Cost(NamedTuple):
    """What a place takes by its operands: bytes that are read and written, and kernels that are launched."""

    moved: int
    launches: int


class Small(NamedTuple):
    """A place as a graph of its own, and what its inputs are like, on the meta device."""

    graph: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]

    def key(self, name: str) -> str | None:
        """What timings of the place are kept under for a pass; None where it cannot be described."""
        try:
            _, described = canonical(self.graph)
        except Unportable:
            return None
        forms = [[list(each.shape), list(each.stride()), str(each.dtype)] for each in self.inputs]
        return digest_of([name, described, forms])

    def __str__(self) -> str:
        operators = Counter(filter(None, map(name_of, self.graph.graph.nodes)))
        shapes = Counter("x".join(map(str, each.shape)) for each in self.inputs)
        dtypes = sorted({str(each.dtype).removeprefix("torch.") for each in self.inputs})
        return f"{_listed(operators)} of {_listed(shapes)} {' '.join(dtypes)}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items())


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a graph that a pass can rewrite.

    Args:
        inputs: what it is computed of, before and after.
        results: what is computed there.
        apart: what it takes as it is.
        fused: what it takes rewritten.
        first: the node that stands for all of its value.
    """

    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    apart: Cost
    fused: Cost
    first: Callable[[fx.Node], fx.Node] = lambda node: node

    def small(self, shapes: Shapes) -> Small:
        """The place as a graph of its own; inputs of equal value are one."""
        inside, graph = self._inside(), fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        inputs: dict[fx.Node, torch.Tensor] = {}
        around = [each for node in inside for each in node.all_input_nodes if each not in inside]
        for node in dict.fromkeys([*self.inputs, *around]):
            standing = self.first(node)
            if standing not in inputs:
                inputs[standing] = shapes[node]
                copies[standing] = graph.placeholder(f"input_{len(inputs)}")
                copies[standing].meta["val"] = shapes[node]
            copies[node] = copies[standing]
        for node in self.results[0].graph.nodes:
            if node in inside:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta = {}
        graph.output(tuple(copies[node] for node in self.results))
        return Small(fx.GraphModule({}, graph), tuple(inputs.values()))

    def _inside(self) -> set[fx.Node]:
        """What the results are made of from the inputs on, with whatever writes to it."""

        def computed(node: fx.Node) -> bool:
            return node not in self.inputs and node.op == "call_function"

        inside, graph = reached(self.results, computed), self.results[0].graph
        memory = Memory(graph)
        written = {node: set(map(memory.root, written_arguments(node))) for node in graph.nodes}
        while more := [
            node
            for node, roots in written.items()
            if roots and node not in inside and roots & set(map(memory.root, inside))
        ]:
            inside |= reached(more, computed)
        return inside


class Choice(NamedTuple):
    """Why a place stays as it is, None where it does not, and what that was decided by."""

    reason: str | None
    by: str


@dataclasses.dataclass(frozen=True)
class Chooser:
    """Chooses for one pass.

    Args:
        name: of the pass.
        timings: what was measured on this device.
        needs_timing: whether nothing is rewritten that was not measured.
    """

    name: str = ""
    timings: Timings = dataclasses.field(default_factory=Timings)
    needs_timing: bool = False

    def choose(self, site: Site, shapes: Shapes) -> Choice:
        """Whether a site is rewritten: where it was measured if that was not slower, else if it moves or launches less.

        Args:
            shapes: what nodes yield.
        """
        timing = self._timing(site, shapes)
        if timing is not None:
            return Choice(timing.refusal, TIMED)
        if self.needs_timing:
            return Choice(UNTIMED, TIMED)
        is_less = site.fused.moved < site.apart.moved or site.fused.launches < site.apart.launches
        return Choice(None if is_less else MORE, ESTIMATED)

    def _timing(self, site: Site, shapes: Shapes) -> Timing | None:
        if not self.timings.entries:
            return None
        key = site.small(shapes).key(self.name)
        return None if key is None else self.timings.entries.get(key)


class Always(Chooser):
    """Takes every site."""

    def choose(self, site: Site, shapes: Shapes) -> Choice:
        """Whatever it costs."""
        return Choice(None, ESTIMATED)


@dataclasses.dataclass(frozen=True)
class Noting(Chooser):
    """Chooses as others do, and notes the sites that it was asked for.

    Args:
        seen: these by their keys, and what was chosen.
    """

    seen: dict[str, tuple[Small, Choice]] = dataclasses.field(default_factory=dict)

    def choose(self, site: Site, shapes: Shapes) -> Choice:
        """As `Chooser.choose`."""
        choice, small = super().choose(site, shapes), site.small(shapes)
        if (key := small.key(self.name)) is not None:
            self.seen[key] = small, choice
        return choice


@dataclasses.dataclass
class Found:
    """What a pass did: how many places it changed, by what it chose them, how many it left for which reason."""

    changed: int = 0
    by: Counter[str] = dataclasses.field(default_factory=Counter)
    apart: Counter[str] = dataclasses.field(default_factory=Counter)

    def takes(self, choice: Choice, count: int = 1) -> bool:
        """Whether places are to be changed, which is counted."""
        if choice.reason is None:
            self.changed += count
            self.by[choice.by] += count
        else:
            self.apart[choice.reason] += count
        return choice.reason is None

    def add(self, other: Found, times: int) -> None:
        """Count what was done in a graph that is called some times."""
        self.changed += other.changed * times
        for mine, more in ((self.by, other.by), (self.apart, other.apart)):
            mine.update({reason: count * times for reason, count in more.items()})

    def __str__(self) -> str:
        by = "".join(f", {count} by {how}" for how, count in sorted(self.by.items()) if count)
        return by + "".join(f"; {count} apart, as {reason}" for reason, count in self.apart.most_common())


def bytes_of(nodes: Iterable[Any], shapes: Shapes) -> int:
    """Bytes of what nodes yield, each counted once; what is no node takes none."""
    return sum(shapes[node].nbytes for node in {node: None for node in nodes if isinstance(node, fx.Node)})
