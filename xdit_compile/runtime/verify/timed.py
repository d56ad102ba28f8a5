"""Times a place that an optional pass can rewrite, as it is and rewritten, once both were seen to agree."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import itertools
import math
import operator
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.backends.base import Backend
from xdit_compile.distributed.devices import finish
from xdit_compile.errors import one_line
from xdit_compile.ir.arguments import node_of, sequence_of
from xdit_compile.ir.precision import precision_for
from xdit_compile.ir.program import Input, Program
from xdit_compile.ir.subgraph import reached, subgraph
from xdit_compile.passes.fuse.fusions import OptionalPass
from xdit_compile.passes.fuse.selection import Always, Small
from xdit_compile.passes.fuse.timings import Timing
from xdit_compile.passes.memory.on_meta import name_of

aten = torch.ops.aten
TOLERANCE = 2e-5
"""Of float32 and wider: how far the results of both may differ, of the greatest value."""
VIEWS = ("alias", "slice", "permute", "transpose", "unsqueeze", "squeeze", "select", "expand", "t")
"""What is no work of its own where it stands last."""
COLD_BYTES = 256 * 2**20
"""So much all copies of the inputs take together, that none is in a cache when its turn comes again."""
COPIES = (2, 16)
"""The fewest and the most copies of the inputs."""
SAMPLE_SECONDS = 2e-3
"""A sample has as many calls as take this long."""
MOST_CALLS = 1000
ROUNDS = 25
ATTEMPTS = 3
"""So often a place is timed where samples differ by more than both programs do."""
Run = Callable[..., Sequence[torch.Tensor]]
Values = Mapping[str, torch.Tensor]
Cut = tuple[Program, fx.GraphModule]
"""A program that gives what kernels write, and the views of that which are its results."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of two programs of the same values.

    Args:
        program: with one call of one structure, whose results are what kernels write.
        tail: from these to the results that are compared: views of them.
        run: what computes the program.
    """

    program: Program
    tail: fx.GraphModule
    run: Run

    @classmethod
    def of(cls, cut: Cut, backend: Backend, device: torch.device) -> Contender:
        """What `without_views` gave, compiled."""
        program, tail = cut
        return cls(program, tail, backend.compile(program.root.to(device)))

    def inputs(self, values: Values) -> list[torch.Tensor]:
        """What the program takes, made of the values of the site's inputs."""
        return [_value(spec, values) for spec in self.program.inputs]

    def results(self, values: Values) -> list[torch.Tensor]:
        """What is compared."""
        return list(self.tail(*self.run(*self.inputs(values))))


def timed(
    small: Small, fusion: OptionalPass, like: Program, backend: Backend, device: torch.device, rounds: int = ROUNDS
) -> Timing | None:  # fmt: skip
    """What is measured of a place; None where the pass leaves the place as it is when it stands alone.

    Args:
        small: the place as a graph of its own.
        fusion: the pass.
        like: a program that it was found in.
        backend: what compiles both.
        device: where they are timed.
        rounds: samples of each, which take turns.

    Raises:
        Exception: what the place as it is raises when it is compiled or run.
    """
    as_it_is, rewritten = both(small, fusion, like)
    if rewritten is None:
        return None
    cuts = list(map(without_views, (as_it_is, rewritten)))
    draw = _Drawing(small, device)
    values = draw.values()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    apart = Contender.of(cuts[0], backend, device)
    with torch.no_grad(), precision_for([each for each in values.values() if each.is_floating_point()]):
        expected = apart.results(values)
        try:
            fused = Contender.of(cuts[1], backend, device)
            error, wrong = _compared(small, values, expected, fused.results(values))
        except Exception as failed:  # whatever a compiler or a kernel of this device raises
            error, wrong = None, f"it failed, {one_line(failed)}"
    if wrong:
        return Timing(fusion.name, str(small), None, None, error, 0, today, wrong)
    with torch.no_grad():
        contenders = _calls((apart, fused), list(draw.copies()), device)
        for _ in range(ATTEMPTS):
            before, after = _interleaved(contenders, rounds)
            timing = Timing(
                fusion.name, str(small), statistics.median(before), statistics.median(after), error, rounds, today,
                spread=spread_of(before, after),
            )  # fmt: skip
            if not timing.is_noise:
                break
    return timing


def both(small: Small, fusion: OptionalPass, like: Program) -> tuple[Program, Program | None]:
    """A place as a program of its own, and what the pass makes of that; None where it leaves it as it is."""
    as_it_is = _program_of(small, like)
    rewritten = fusion.run(as_it_is, Always(fusion.name))
    before, after = ([str(each.graph) for each in program.structures().values()] for program in (as_it_is, rewritten))
    return as_it_is, None if before == after else rewritten


def _program_of(small: Small, like: Program) -> Program:
    """One call of a place; weights and biases of its linears are parameters, and views of the results leave it."""
    inner = fx.GraphModule(small.graph, copy.deepcopy(small.graph.graph))
    output = inner.graph.output_node()
    with inner.graph.inserting_before(output):
        output.args = (tuple(inner.graph.call_function(aten.alias.default, (each,)) for each in _leaves(output)),)
    inner.recompile()
    placeholders = inner.graph.find_nodes(op="placeholder")
    weights = _weights(inner.graph)
    inputs = tuple(
        Input(node.name, "parameter" if node in weights else "user", node.name if node in weights else position)
        for position, node in enumerate(placeholders)
    )
    return dataclasses.replace(
        like, root=_root_of(inner, placeholders), inputs=inputs, constants={}, guards=(), kept=()
    )


def _leaves(output: fx.Node) -> list[fx.Node]:
    return list(map(node_of, sequence_of(output.args[0])))


def _weights(graph: fx.Graph) -> set[fx.Node]:
    linears = graph.find_nodes(op="call_function", target=aten.linear.default)
    return {each for linear in linears for each in linear.args[1:] if isinstance(each, fx.Node)}


def _root_of(structure: fx.GraphModule, placeholders: Sequence[fx.Node]) -> fx.GraphModule:
    """A root graph that calls a structure of inputs as those of another."""
    graph = fx.Graph()
    for node in placeholders:
        graph.placeholder(node.name).meta["val"] = node.meta["val"]
    made = graph.create_node("call_module", "site", tuple(graph.find_nodes(op="placeholder")))
    count = len(_leaves(structure.graph.output_node()))
    graph.output(tuple(graph.call_function(operator.getitem, (made, position)) for position in range(count)))
    return fx.GraphModule({"site": structure}, graph)


def without_views(program: Program) -> Cut:
    """A program of one structure that gives what kernels write, and the views of that which it gave.

    The results of a compiled graph are copied where they are views, and what reads them would not need that.

    Raises:
        ValueError: the root does more than call the structure.
    """
    (structure,) = program.structures().values()
    computing = [node for node in program.root.graph.nodes if node.op == "call_function"]
    if any(node.target is not operator.getitem for node in computing):
        raise ValueError("a pass put something into the root")
    graph = copy.deepcopy(structure.graph)
    leaves = _leaves(graph.output_node())
    bases = dict.fromkeys(map(_base, leaves))
    views = reached(leaves, lambda node: node not in bases)
    for node in bases:
        node.meta.setdefault("val", None)
    ordered = [node for node in graph.nodes if node in views]
    tail = fx.GraphModule({}, subgraph({node: f"made_{n}" for n, node in enumerate(bases)}, ordered, leaves))
    graph.output_node().args = (tuple(bases),)
    for node in reversed(ordered):
        if not node.users:
            graph.erase_node(node)
    root = _root_of(fx.GraphModule(structure, graph), program.root.graph.find_nodes(op="placeholder"))
    return dataclasses.replace(program, root=root), tail


def _base(node: fx.Node) -> fx.Node:
    while name_of(node) in VIEWS:
        node = node_of(node.args[0])
    return node


def _value(spec: Input, values: Values) -> torch.Tensor:
    return torch.cat([values[each.name] for each in spec.members]) if spec.members else values[spec.name]


class _Drawing:
    """Random inputs of a place: of a standard normal distribution, weights divided by the square root of their width.

    Results have about the size of one then; whole numbers and truth values are zeros and ones.
    """

    def __init__(self, small: Small, device: torch.device):
        self._device, self._random = device, torch.Generator(device).manual_seed(0)
        nodes = small.graph.graph.find_nodes(op="placeholder")
        self._forms = {node.name: like for node, like in zip(nodes, small.inputs, strict=True)}
        self._weights = {node.name for node in _weights(small.graph.graph)}

    def values(self) -> dict[str, torch.Tensor]:
        """One set of inputs."""
        return {name: self._one(like, name in self._weights) for name, like in self._forms.items()}

    def copies(self) -> Iterator[dict[str, torch.Tensor]]:
        """As many as caches do not hold."""
        size = max(1, sum(each.nbytes for each in self._forms.values()))
        fewest, most = COPIES
        for _ in range(min(most, max(fewest, math.ceil(COLD_BYTES / size)))):
            yield self.values()

    def _one(self, like: torch.Tensor, is_weight: bool) -> torch.Tensor:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
        flat = torch.empty(extent, dtype=like.dtype, device=self._device)
        if like.is_floating_point():
            width = like.shape[-1] if is_weight and like.dim() > 1 else 1
            flat.normal_(std=width**-0.5, generator=self._random)
        else:
            flat.random_(0, 2, generator=self._random)
        return flat.as_strided(like.shape, like.stride())


def _compared(
    small: Small, values: Values, expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]
) -> tuple[float, str]:  # fmt: skip
    """How far results are off, of the greatest value, and why that is too far.

    In float32 both are compared. What has fewer digits is compared with float64, where the rewritten may be farther off
    than the other by one unit in the last place of the greatest value.
    """
    narrow = any(torch.finfo(each.dtype).bits < 32 for each in expected if each.is_floating_point())
    if not narrow:
        error = _off(actual, expected)
        return error, "" if error <= TOLERANCE else f"it is {error:.1e} of the greatest value off"
    exact = _exact(small, values)
    before, error = _off(expected, exact), _off(actual, exact)
    unit = max(torch.finfo(each.dtype).eps for each in expected if each.is_floating_point())
    is_near = error <= before + unit
    return error, "" if is_near else f"it is {error:.1e} of the greatest value off float64, apart {before:.1e}"


def _off(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The greatest difference of some results, each of its greatest value; infinite where one is no number."""
    ratios = [0.0]
    for one, like in zip(actual, expected, strict=True):
        if one.shape != like.shape:
            return math.inf
        one, like = one.double().to(like.device), like.double()
        ratio = float((one - like).abs().max() / like.abs().max().clamp(min=1e-30)) if like.numel() else 0.0
        ratios.append(ratio if math.isfinite(ratio) else math.inf)
    return max(ratios)


def _exact(small: Small, values: Values) -> list[torch.Tensor]:
    """The results in float64, op by op; on the CPU where there are operators of our own, which have float64 there."""

    def widened(value: Any) -> Any:
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    graph = copy.deepcopy(small.graph.graph)
    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, widened)
        node.kwargs = fx.node.map_aggregate(node.kwargs, widened)
    own = any(getattr(node.target, "namespace", "aten") != "aten" for node in graph.nodes)
    given = [value.double() if value.is_floating_point() else value for value in values.values()]
    return list(fx.GraphModule({}, graph)(*[value.cpu() if own else value for value in given]))


def spread_of(apart: Sequence[float], fused: Sequence[float]) -> float:
    """How far the ratio of the medians of two kinds of samples, which took turns, may be off.

    That is the standard error of the median ratio of neighbours, by their median absolute deviation, or how far the
    ratio of the least samples lies from that of the medians, whichever is more. A process that shares its processor is
    stopped for whole slices of time: medians may then differ by a factor of 2 where nothing else does, but some samples
    of a few milliseconds each are free of that.
    """
    ratios = [after / before for before, after in zip(apart, fused, strict=True)]
    middle = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(each - middle) for each in ratios)
    of_medians = statistics.median(fused) / statistics.median(apart)
    return max(1.2533 * deviation / math.sqrt(len(ratios)), abs(of_medians - min(fused) / min(apart)))


def _calls(contenders: Sequence[Contender], copies: Sequence[Values], device: torch.device) -> list[_Calls]:
    """The calls of each contender; one has other inputs than the one before."""
    return [_Calls(each.run, [each.inputs(values) for values in copies], device) for each in contenders]


def _interleaved(calls: Sequence[_Calls], rounds: int) -> list[list[float]]:
    """Seconds of one call in each sample of each contender, which take turns."""
    first = min(each.first() for each in calls)
    count = max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(first, 1e-9))))
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        order = list(enumerate(calls))
        for position, each in order if number % 2 else reversed(order):
            samples[position].append(each.seconds(count))
    return samples


class _Calls:
    """Calls of a function, on one set of inputs after the other."""

    def __init__(self, run: Run, inputs: Sequence[Sequence[torch.Tensor]], device: torch.device):
        self._run, self._inputs, self._device = run, itertools.cycle(inputs), device
        self._count = len(inputs)

    def first(self) -> float:
        """Seconds of one of the first calls, two for each set of inputs."""
        return self.seconds(2 * self._count)

    def seconds(self, count: int) -> float:
        """Seconds of one of some calls in a row: by events on CUDA, else until the device has done everything."""
        if self._device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(self._device)
            start.record()
            self._go(count)
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3 / count
        finish()
        begin = time.perf_counter()
        self._go(count)
        finish()
        return (time.perf_counter() - begin) / count

    def _go(self, count: int) -> None:
        for _ in range(count):
            self._run(*next(self._inputs))
