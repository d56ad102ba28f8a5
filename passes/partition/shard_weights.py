"""Finds weights of which a rank's program takes one slice alone, and makes the slice what the program is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from xdit_compile.ir.arguments import node_of
from xdit_compile.ir.program import Input, Program, WeightSlice
from xdit_compile.passes.local.local_graph import SLICE

Use = tuple[str, int]
"""A structure and the position of one of its placeholders."""


def keep_slices(program: Program, name: str) -> Program:
    """The program with weights given as the slices along mesh dimension ``name`` that all of its calls take.

    The graphs of the structures are changed in place. A weight that any call takes otherwise stays whole.
    """
    weights = {spec.name: spec for spec in program.inputs if spec.kind in ("parameter", "buffer")}
    actuals: dict[Use, set[fx.Node]] = {}
    for call in program.calls():
        for position, actual in enumerate(call.args):
            actuals.setdefault((str(call.target), position), set()).add(node_of(actual))
    slices_of = {
        (structure, position): slices
        for structure, module in program.structures().items()
        for position, formal in enumerate(module.graph.find_nodes(op="placeholder"))
        if (slices := list(_slices(formal, name)))
    }
    _drop_where_calls_differ(slices_of, actuals, weights)
    pieces: dict[str, tuple[WeightSlice, ...]] = {}
    for use, slices in slices_of.items():
        for actual in actuals[use]:
            pieces[actual.name] = _pieces(slices)
        _give_slice(program.structures()[use[0]], slices)
    inputs = tuple(dataclasses.replace(spec, pieces=pieces.get(spec.name, ())) for spec in program.inputs)
    return dataclasses.replace(program, inputs=inputs)


def _slices(formal: fx.Node, name: str) -> Iterator[fx.Node]:
    """The slice of a placeholder through which all of its users see it, the slice of that one, and so on."""
    node = formal
    while True:
        users = list(node.users)
        slices = {user for user in _reached(users) if user.meta.get(SLICE, (None, None))[:2] == (node, name)}
        if len(slices) != 1:
            return
        (node_slice,) = slices
        if not all(user is node_slice or node_slice in user.users and len(user.users) == 1 for user in users):
            return
        yield node_slice
        node = node_slice


def _reached(users: list[fx.Node]) -> list[fx.Node]:
    """A slice of several runs is joined from slices of one each."""
    return [*users, *(joined for user in users for joined in user.users)]


def _pieces(slices: list[fx.Node]) -> tuple[WeightSlice, ...]:
    return tuple(node.meta[SLICE][2] for node in slices)


def _drop_where_calls_differ(
    slices_of: dict[Use, list[fx.Node]], actuals: dict[Use, set[fx.Node]], weights: dict[str, Input]
) -> None:
    """Keep only uses whose actuals are weights that every other use takes in the same pieces."""
    uses: dict[fx.Node, list[Use]] = {}
    for use, nodes in actuals.items():
        for node in nodes:
            uses.setdefault(node, []).append(use)

    def agrees(use: Use) -> bool:
        wanted = _pieces(slices_of[use])
        return all(
            node.name in weights
            and not any(user.op == "output" for user in node.users)
            and all(other in slices_of and _pieces(slices_of[other]) == wanted for other in uses[node])
            for node in actuals[use]
        )

    while wrong := [use for use in slices_of if not agrees(use)]:
        for use in wrong:
            slices_of.pop(use)


def _give_slice(module: fx.GraphModule, slices: list[fx.Node]) -> None:
    formal = slices[0].meta[SLICE][0]
    slices[-1].replace_all_uses_with(formal)
    module.graph.eliminate_dead_code()
    module.recompile()
