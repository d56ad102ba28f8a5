"""Makes one product of linears that read the same value: it is read once, and one kernel is launched for all of them.

Weights come as one tensor with the parts one below the other (`Weights` lays the module's parameters so in memory), and
every part of the result is a view. Which linears these are is the same in every call of a structure.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.capture.simplify import erase_with_sources
from xdit_compile.ir.arguments import integer_of, node_of, sequence_of
from xdit_compile.ir.program import Input, Program
from xdit_compile.ir.subgraph import placeholders_first
from xdit_compile.passes.memory.on_meta import Shapes, shapes_of
from xdit_compile.passes.partition.hide_exchanges import leave_early
from xdit_compile.passes.partition.slice_results import slice_results

from .equal_values import EqualValues
from .selection import Chooser, Cost, Found, bytes_of
from .selection import Site as Place

aten = torch.ops.aten
Site = tuple[int, ...]
"""Positions of parameters among the arguments of a structure."""
COMPUTED = "a weight or bias is computed, or used for something else"
LEAVES = "the result leaves the structure and would be copied"
WRITTEN = "the value is written to"
NO_OTHER = "no other has, or lacks, a bias as it does"
UNLIKE = "weights are no parameters of one dtype and device, or one and the same"
EARLY = "its result leaves before the others are computed"
CONTESTED = "a parameter would belong to two joined tensors"
MOST_BYTES = 2**30
"""Of parameters that become one tensor: laying them in one piece takes their size once more for a moment."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Linears of one structure that read the same value, in their order.

    Args:
        weights: where the structure takes their weights.
        biases: where it takes their biases; empty where they have none.
        leaves: whether their results are results of the structure, which it then gives as one.
    """

    weights: Site
    biases: Site
    leaves: bool = False

    def of(self, placeholders: Sequence[fx.Node]) -> list[fx.Node]:
        """The linears themselves, by the arguments of their structure."""
        return [next(iter(placeholders[position].users)) for position in self.weights]


def join_linears(program: Program, chooser: Chooser | None = None) -> Program:
    """The same program with one linear for all that read the same value, where their weights are parameters.

    Linears stay apart where one's weight is used for something else in the structure, or is no parameter; where dtypes
    differ, or only some have a bias; where a result leaves the structure and would be copied, as the structure reads
    it, too, or the root gives it on; where the value is written to; where a parameter would belong to two joined
    tensors, or to one of more than `MOST_BYTES`; where results leave for other ranks before the others are computed
    (`hide_exchanges`); and where the one was slower when it was timed.

    Args:
        chooser: what was measured.
    """
    return slice_results(_Root(program, chooser).run())


def told(program: Program, chooser: Chooser | None = None) -> str:
    """What is joined in one call of the module, and what is not although it reads the same value as another linear."""
    root = _Root(program, chooser)
    joined = root.run()
    before, after = (_linears(each) for each in (program, joined))
    return f"join_linears: {after} products in place of {before}{root.found}"


def groups_of(structure: fx.GraphModule) -> tuple[list[Group], Counter[str]]:
    """The linears of a structure that read the same value and could be one, and why other ones could not."""
    positions = {node: at for at, node in enumerate(structure.graph.find_nodes(op="placeholder"))}
    values = EqualValues(structure.graph)
    by_source: dict[fx.Node, list[fx.Node]] = {}
    for node in structure.graph.find_nodes(op="call_function", target=aten.linear.default):
        by_source.setdefault(values.first(node_of(node.args[0])), []).append(node)
    groups, apart, early = [], Counter[str](), leave_early(structure.graph)
    for linears in by_source.values():
        alike: dict[tuple[bool, bool, bool], list[fx.Node]] = {}
        for node in linears if len(linears) > 1 else ():
            reason = _alone(node, positions, values)
            apart.update([reason] if reason else [])
            if reason is None:
                alike.setdefault((len(_parameters(node)) == 2, _leaves(node), node in early), []).append(node)
        for (biased, leave, ahead), some in alike.items():
            if len(some) == 1:
                apart[EARLY if ahead else NO_OTHER] += 1
                continue
            weights = tuple(positions[each.args[1]] for each in some)
            groups.append(Group(weights, tuple(positions[each.args[2]] for each in some) if biased else (), leave))
    return groups, apart


def _place(structure: fx.GraphModule, group: Group, values: EqualValues, shapes: Shapes) -> Place:
    """The linears of a group: each is a kernel that reads the value."""
    placeholders = structure.graph.find_nodes(op="placeholder")
    parameters = [placeholders[position] for position in (*group.weights, *group.biases)]
    linears = group.of(placeholders)
    sources = [node_of(linear.args[0]) for linear in linears]
    once, rest = shapes[sources[0]].nbytes, bytes_of([*parameters, *linears], shapes)
    return Place(
        tuple(dict.fromkeys([*sources, *parameters])), tuple(linears),
        Cost(len(linears) * once + rest, len(linears)), Cost(once + rest, 1), values.first,
    )  # fmt: skip


def _alone(node: fx.Node, positions: Mapping[fx.Node, int], values: EqualValues) -> str | None:
    """Why a linear cannot be joined with others of its value; None where it can."""
    if node.kwargs or not all(each in positions and len(each.users) == 1 for each in _parameters(node)):
        return COMPUTED
    if _leaves(node) and len(node.users) > 1:
        return LEAVES
    return WRITTEN if values.is_written(node_of(node.args[0])) else None


def _stays(structure: fx.GraphModule, group: Group, call: fx.Node) -> bool:
    """Whether results of a group that leave its structure are read by other ones, and not what the root gives."""
    if not group.leaves:
        return True
    linears = group.of(structure.graph.find_nodes(op="placeholder"))
    results = sequence_of(structure.graph.output_node().args[0])
    items = [item for item in call.users if results[integer_of(item.args[1])] in linears]
    return not any(user.op == "output" for item in items for user in item.users)


def _leaves(linear: fx.Node) -> bool:
    return any(user.op == "output" for user in linear.users)


def _parameters(linear: fx.Node) -> list[Any]:
    return [each for each in linear.args[1:] if each is not None]


def _linears(program: Program) -> int:
    """Linears of one call of the module."""
    structures = program.structures()
    counts = {
        name: len(each.graph.find_nodes(op="call_function", target=aten.linear.default))
        for name, each in structures.items()
    }
    return sum(counts[str(call.target)] for call in program.calls())


class _Root:
    """The root graph of a program while its parameters are joined."""

    def __init__(self, program: Program, chooser: Chooser | None):
        self._program, self._chooser = program, chooser or Chooser("join_linears")
        self._graph = copy.deepcopy(program.root.graph)
        placeholders = self._graph.find_nodes(op="placeholder")
        self._specs = dict(zip(placeholders, program.inputs, strict=False))
        self._received = placeholders[len(program.inputs) :]
        self._joined: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.found = Found()

    def run(self) -> Program:
        modules: dict[str, fx.GraphModule] = {}
        calls: dict[str, list[fx.Node]] = {}
        for call in self._graph.find_nodes(op="call_module"):
            calls.setdefault(str(call.target), []).append(call)
        candidates: dict[str, list[Group]] = {}
        for name, structure in self._program.structures().items():
            groups, apart = groups_of(structure)
            for reason, count in apart.items():
                self.found.apart[reason] += count * len(calls[name])
            groups = self._kept(groups, calls[name], functools.partial(_stays, structure), LEAVES)
            candidates[name] = self._kept(groups, calls[name], self._joinable, UNLIKE)
        contested = self._contested(candidates, calls)
        for name, structure in self._program.structures().items():
            groups = self._kept(
                candidates[name], calls[name],
                lambda group, call: not any(contested & set(members) for members in _members(group, call)), CONTESTED,
            )  # fmt: skip
            groups = self._chosen(structure, groups, len(calls[name]))
            pieces = [piece for group in groups for piece in self._pieces(group, calls[name][0])]
            modules[name] = self._rewritten(structure, pieces, calls[name]) if pieces else structure
        for node in [node for node in self._specs if node.op == "placeholder" and not node.users]:
            if any(node in members for members in self._joined):
                self._graph.erase_node(node)
                del self._specs[node]
        self._graph.lint()
        placeholders = [node for node in self._graph.find_nodes(op="placeholder") if node not in self._received]
        inputs = tuple(self._specs[node] for node in placeholders)
        return dataclasses.replace(self._program, root=fx.GraphModule(modules, self._graph), inputs=inputs)

    def _kept(
        self, groups: list[Group], calls: list[fx.Node], fits: Callable[[Group, fx.Node], bool], reason: str
    ) -> list[Group]:
        """The groups that fit in all calls of their structure; the others are counted."""
        kept = [group for group in groups if all(fits(group, call) for call in calls)]
        lost = sum(len(group.weights) for group in groups) - sum(len(group.weights) for group in kept)
        self.found.apart.update({reason: lost * len(calls)} if lost else {})
        return kept

    def _chosen(self, structure: fx.GraphModule, groups: list[Group], calls: int) -> list[Group]:
        """The groups that are to be joined; linears of all calls are counted."""
        values = EqualValues(structure.graph)
        choices = [
            self._chooser.choose(_place(structure, group, values, self._shapes), self._shapes) for group in groups
        ]
        return [
            group
            for group, choice in zip(groups, choices, strict=True)
            if self.found.takes(choice, len(group.weights) * calls)
        ]

    @functools.cached_property
    def _shapes(self) -> Shapes:
        return shapes_of(self._program)

    def _joinable(self, group: Group, call: fx.Node) -> bool:
        """Whether a call gives the group parameters that can lie one below the other."""
        for members in _members(group, call):
            specs = [self._specs.get(member) for member in members]
            if any(spec is None or spec.kind != "parameter" for spec in specs) or len({*members}) < len(members):
                return False
            if len({_form(member.meta["val"]) for member in members}) > 1:
                return False
        return True

    def _contested(self, groups: dict[str, list[Group]], calls: dict[str, list[fx.Node]]) -> set[fx.Node]:
        """Parameters that would belong to two joined tensors."""
        owner: dict[fx.Node, tuple[fx.Node, ...]] = {}
        contested = set()
        for name, some in groups.items():
            for members in (members for call in calls[name] for group in some for members in _members(group, call)):
                for member in members:
                    if owner.setdefault(member, members) != members:
                        contested.add(member)
        return contested

    def _pieces(self, group: Group, call: fx.Node) -> list[Group]:
        """A group as several, none of which joins more than `MOST_BYTES`."""
        sites: list[list[int]] = []
        total = MOST_BYTES
        for number, member in enumerate(_members(group, call)[0]):
            value = member.meta["val"]
            size = math.prod(self._specs[member].sizes(value.shape)) * value.element_size()
            total += size
            if total > MOST_BYTES:
                sites.append([])
                total = size
            sites[-1].append(number)
        weights = [tuple(group.weights[number] for number in numbers) for numbers in sites]
        biases = [tuple(group.biases[number] for number in numbers if group.biases) for numbers in sites]
        pairs = zip(weights, biases, strict=True)
        return [Group(weight, bias, group.leaves) for weight, bias in pairs if len(weight) > 1]

    def _rewritten(
        self, structure: fx.GraphModule, groups: Sequence[Group], calls: Iterable[fx.Node]
    ) -> fx.GraphModule:
        """A structure with its groups joined, and its calls with what it takes then."""
        module = fx.GraphModule(structure, copy.deepcopy(structure.graph))
        placeholders = placeholders_first(module.graph)
        gone = {position for group in groups for position in (*group.weights, *group.biases)}
        for call in calls:
            added = [self._of(members) for group in groups for members in _members(group, call)]
            sizes = [[self._rows(member) for member in next(iter(_members(group, call)))] for group in groups]
            call.args = (*(each for at, each in enumerate(call.args) if at not in gone), *added)
        wholes = [_join(module.graph, placeholders, *each) for each in zip(groups, sizes, strict=True)]
        _give_together([pair for pair, group in zip(wholes, groups, strict=True) if group.leaves])
        for position in gone:
            module.graph.erase_node(placeholders[position])
        module.graph.lint()
        return fx.GraphModule(module, module.graph)

    def _rows(self, member: fx.Node) -> int:
        return integer_of(self._specs[member].sizes(member.meta["val"].shape)[0])

    def _of(self, members: tuple[fx.Node, ...]) -> fx.Node:
        """The placeholder of parameters that are joined, made once."""
        if members not in self._joined:
            specs = tuple(self._specs[member] for member in members)
            value = members[0].meta["val"]
            rows = sum(map(self._rows, members))
            with self._graph.inserting_before(members[0]):
                node = self._graph.placeholder(f"joined_{len(self._joined)}")
            rest = specs[0].sizes(value.shape)[1:]
            node.meta["val"] = torch.empty((rows, *rest), dtype=value.dtype, device="meta")
            self._specs[node] = Input(node.name, "joined", node.name, members=specs)
            self._joined[members] = node
        return self._joined[members]


def _form(value: torch.Tensor) -> tuple[Any, ...]:
    return value.dtype, value.device, value.dim()


def _members(group: Group, call: fx.Node) -> list[tuple[fx.Node, ...]]:
    """What a call gives for a group's weights, and for its biases if it has any."""
    sites = [site for site in (group.weights, group.biases) if site]
    return [tuple(sequence_of(call.args)[position] for position in site) for site in sites]


def _join(graph: fx.Graph, placeholders: Sequence[fx.Node], group: Group, rows: Sequence[int]) -> tuple[fx.Node, int]:
    """One linear in the place of a group, with the joined parameters as further arguments of the structure.

    Returns:
        The linear, and how many columns it has.
    """
    linears = group.of(placeholders)
    taken = []
    for _ in filter(None, (group.weights, group.biases)):
        known = graph.find_nodes(op="placeholder")
        with graph.inserting_after(known[-1]):
            taken.append(graph.placeholder(f"joined_{len(known)}"))
    with graph.inserting_before(linears[0]):
        joined = graph.call_function(aten.linear.default, (linears[0].args[0], *taken))
        start = 0
        for linear, count in zip(linears, rows, strict=True):
            view = graph.call_function(aten.slice.Tensor, (joined, -1, start, start + count))
            linear.replace_all_uses_with(view)
            start += count
    for linear in linears:
        erase_with_sources(linear)
    return joined, start


def _give_together(wholes: Sequence[tuple[fx.Node, int]]) -> None:
    """Have linears of one value whose results leave the structure leave it as one value."""
    by_source: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
    for whole, columns in wholes:
        by_source.setdefault(node_of(whole.args[0]), []).append((whole, columns))
    for some in (some for some in by_source.values() if len(some) > 1):
        last = max(whole for whole, _ in some)
        with last.graph.inserting_after(last):
            together = last.graph.call_function(aten.cat.default, ([whole for whole, _ in some], -1))
        begin = 0
        for whole, columns in some:
            for view in [user for user in whole.users if user is not together]:
                _, dim, start, stop = view.args
                together.append(view)
                view.args = (together, dim, integer_of(start) + begin, integer_of(stop) + begin)
            begin += columns
