"""Makes one product of linears that read the same value: it is read once, and one kernel is launched for all of them.

Weights come as one tensor with the parts one below the other (`Weights` lays the module's parameters so in memory), and
every part of the result is a view. Which linears these are is the same in every call of a structure.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from xdit_compile.capture.simplify import erase_with_sources
from xdit_compile.ir.arguments import integer_of, node_of, sequence_of
from xdit_compile.ir.program import Input, Program
from xdit_compile.ir.subgraph import placeholders_first

from .equal_values import EqualValues

aten = torch.ops.aten
Site = tuple[int, ...]
"""Positions of parameters among the arguments of a structure."""
COMPUTED = "a weight or bias is computed, or used for something else"
LEAVES = "the result leaves the structure and would be copied"
WRITTEN = "the value is written to"
NO_OTHER = "no other has, or lacks, a bias as it does"
UNLIKE = "weights are no parameters of one dtype and device, or one and the same"
CONTESTED = "a parameter would belong to two joined tensors"


@dataclasses.dataclass(frozen=True)
class Group:
    """Linears of one structure that read the same value, in their order.

    Args:
        weights: where the structure takes their weights.
        biases: where it takes their biases; empty where they have none.
    """

    weights: Site
    biases: Site


def join_linears(program: Program) -> Program:
    """The same program with one linear for all that read the same value, where their weights are parameters.

    Linears stay apart where one's weight is used for something else in the structure, or is no parameter; where dtypes
    differ, or only some have a bias; where a result leaves the structure, as it would have to be copied; where the
    value is written to; and where a parameter would belong to two joined tensors.
    """
    return _Root(program).run()


def told(program: Program) -> str:
    """What is joined in one call of the module, and what is not although it reads the same value as another linear."""
    root = _Root(program)
    joined = root.run()
    before, after = (_linears(each) for each in (program, joined))
    apart = "".join(f"; {count} apart, as {reason}" for reason, count in root.apart.most_common())
    return f"join_linears: {after} products in place of {before}{apart}"


def groups_of(structure: fx.GraphModule) -> tuple[list[Group], Counter[str]]:
    """The linears of a structure that read the same value and could be one, and why other ones could not."""
    positions = {node: at for at, node in enumerate(structure.graph.find_nodes(op="placeholder"))}
    values = EqualValues(structure.graph)
    by_source: dict[fx.Node, list[fx.Node]] = {}
    for node in structure.graph.find_nodes(op="call_function", target=aten.linear.default):
        by_source.setdefault(values.first(node_of(node.args[0])), []).append(node)
    groups, apart = [], Counter[str]()
    for linears in by_source.values():
        alike: dict[bool, list[fx.Node]] = {}
        for node in linears if len(linears) > 1 else ():
            reason = _alone(node, positions, values)
            apart.update([reason] if reason else [])
            if reason is None:
                alike.setdefault(len(_parameters(node)) == 2, []).append(node)
        for biased, some in alike.items():
            if len(some) == 1:
                apart[NO_OTHER] += 1
                continue
            weights = tuple(positions[each.args[1]] for each in some)
            groups.append(Group(weights, tuple(positions[each.args[2]] for each in some) if biased else ()))
    return groups, apart


def _alone(node: fx.Node, positions: Mapping[fx.Node, int], values: EqualValues) -> str | None:
    """Why a linear cannot be joined with others of its value; None where it can."""
    if node.kwargs or not all(each in positions and len(each.users) == 1 for each in _parameters(node)):
        return COMPUTED
    if any(user.op == "output" for user in node.users):
        return LEAVES
    return WRITTEN if values.is_written(node_of(node.args[0])) else None


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

    def __init__(self, program: Program):
        self._program = program
        self._graph = copy.deepcopy(program.root.graph)
        placeholders = self._graph.find_nodes(op="placeholder")
        self._specs = dict(zip(placeholders, program.inputs, strict=False))
        self._received = placeholders[len(program.inputs) :]
        self._joined: dict[tuple[fx.Node, ...], fx.Node] = {}
        self.apart = Counter[str]()

    def run(self) -> Program:
        modules: dict[str, fx.GraphModule] = {}
        calls: dict[str, list[fx.Node]] = {}
        for call in self._graph.find_nodes(op="call_module"):
            calls.setdefault(str(call.target), []).append(call)
        candidates: dict[str, list[Group]] = {}
        for name, structure in self._program.structures().items():
            groups, apart = groups_of(structure)
            for reason, count in apart.items():
                self.apart[reason] += count * len(calls[name])
            candidates[name] = self._kept(groups, calls[name], self._joinable, UNLIKE)
        contested = self._contested(candidates, calls)
        for name, structure in self._program.structures().items():
            groups = self._kept(
                candidates[name], calls[name],
                lambda group, call: not any(contested & set(members) for members in _members(group, call)), CONTESTED,
            )  # fmt: skip
            modules[name] = self._rewritten(structure, groups, calls[name]) if groups else structure
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
        self.apart.update({reason: lost * len(calls)} if lost else {})
        return kept

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
        for group, rows in zip(groups, sizes, strict=True):
            _join(module.graph, placeholders, group, rows)
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


def _join(graph: fx.Graph, placeholders: Sequence[fx.Node], group: Group, rows: Sequence[int]) -> None:
    """One linear in the place of a group, with the joined parameters as further arguments of the structure."""
    linears = [next(iter(placeholders[position].users)) for position in group.weights]
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
