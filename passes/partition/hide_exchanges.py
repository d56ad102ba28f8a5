"""Puts exchanges that are begun as early in a structure as they can stand, and their ends as late.

Whatever does not depend on one another is computed in the order in which the module has it: queries and keys before the
values that could leave meanwhile, or a feed-forward before the attention beside it. Here all that an exchange needs
comes first, and what it brings is waited for right before it is read. Ops at which ranks meet keep their order, which
is thereby the same on all ranks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import fx

import xdit_compile.kernels.attention  # noqa: F401  (registers the op)
from xdit_compile.ir.arguments import node_of
from xdit_compile.ir.program import Program
from xdit_compile.kernels.collectives.registration import ordered_ops
from xdit_compile.passes.lowering.hidden_exchange import LATENCY_S

aten, ops = torch.ops.aten, torch.ops.xdit_compile
BEGUN, ENDED = ops.all_to_all_start.default, ops.all_to_all_finish.default


def hide_exchanges(program: Program) -> Program:
    """The same program, its structures in that order; one that writes to a value in place stays as it is."""
    modules = {name: _ordered(structure) for name, structure in program.structures().items()}
    if modules == program.structures():
        return program
    return dataclasses.replace(program, root=fx.GraphModule(modules, copy.deepcopy(program.root.graph)))


def told(program: Program, link: float | None) -> Iterator[str]:
    """What is begun ahead in one call of the module; nothing where no link is named.

    Args:
        link: bytes per second that leave a rank.
    """
    structures = program.structures()
    count = sum(len(_begun(structures[str(call.target)].graph)) for call in program.calls())
    if count:
        yield f"hide_exchanges: {count} all-to-alls begun ahead of what is computed meanwhile"
    elif link is not None:
        reason = f"none takes longer than the {LATENCY_S * 1e6:.0f} µs that one more costs, or ranks have unlike heads"
        yield f"hide_exchanges: no exchange is hidden: {reason}"


def leave_early(graph: fx.Graph) -> set[fx.Node]:
    """Linears whose results go into an exchange that is begun before whatever it can be."""
    early = set()
    for start in _begun(graph):
        pending, seen = [node_of(start.args[0])], set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen or node.target in (ops.attention.default, *ordered_ops()):
                continue
            seen.add(node)
            if node.target is aten.linear.default:
                early.add(node)
            else:
                pending += node.all_input_nodes
    return early


def _begun(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=BEGUN))


def _ordered(structure: fx.GraphModule) -> fx.GraphModule:
    if not _begun(structure.graph) or any(map(_writes, structure.graph.nodes)):
        return structure
    graph = copy.deepcopy(structure.graph)
    place = graph._root
    for node in _order(graph):
        place.append(node)
        place = node
    graph.lint()
    return fx.GraphModule(structure, graph)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _order(graph: fx.Graph) -> list[fx.Node]:
    """Inputs, then what each exchange needs that is begun, then the rest as it was; an end where it is needed first."""
    before, met = dict[fx.Node, list[fx.Node]](), None
    for node in graph.nodes:
        before[node] = list(node.all_input_nodes)
        if node.target in ordered_ops():
            before[node] += [met] if met is not None else []
            met = node
    order = dict.fromkeys(node for node in before if node.op in ("placeholder", "get_attr"))
    late = [node for node in before if node.target is ENDED]
    for wanted in [*_begun(graph), *(node for node in before if node not in late)]:
        needed, pending = set[fx.Node](), [wanted]
        while pending:
            node = pending.pop()
            if node not in order and node not in needed:
                needed.add(node)
                pending += before[node]
        order.update(dict.fromkeys(sorted(needed)))
    return list(order)
