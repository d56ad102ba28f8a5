"""Whether a program is well formed, as every pass must leave it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from xdit_compile.errors import BrokenProgramError

from .arguments import sequence_of
from .program import Program


def verify_program(program: Program, name: str, metadata: bool = True, received: int = 0) -> None:
    """Look at a program as a whole.

    Args:
        name: what to call it where something is wrong.
        metadata: whether every node has to say what it makes; in what one rank runs, inputs alone do.
        received: how many placeholders stand behind the inputs, for what comes from the stage before.

    Raises:
        BrokenProgramError: a graph that is not well formed, a placeholder without input, a node without metadata, a
            call of what is not there or with too few arguments, a result that a structure has not, a dead structure.
    """
    graphs = {name: program.root.graph}
    graphs |= {f"{name}.{called}": structure.graph for called, structure in program.structures().items()}
    for where, graph in graphs.items():
        try:
            graph.lint()
        except (RuntimeError, ValueError) as error:
            raise BrokenProgramError(f"{where}: {error}") from error
        if metadata:
            _has_metadata(graph, where)
    _has_inputs(program, name, received)
    _has_calls(program, name)


def _has_metadata(graph: fx.Graph, where: str) -> None:
    for node in graph.nodes:
        if node.op in ("placeholder", "call_function", "get_attr") and node.meta.get("val") is None:
            raise BrokenProgramError(f"{where}: {node.name} has no metadata")


def _has_inputs(program: Program, name: str, received: int) -> None:
    placeholders = program.root.graph.find_nodes(op="placeholder")
    placeholders = placeholders[: len(placeholders) - received]
    for node in placeholders[len(program.inputs) :]:
        raise BrokenProgramError(f"{name}: placeholder {node.name} has no input")
    for spec in program.inputs[len(placeholders) :]:
        raise BrokenProgramError(f"{name}: input {spec.name} has no placeholder")
    for spec, node in zip(program.inputs, placeholders, strict=True):
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            raise BrokenProgramError(f"{name}: placeholder {node.name} has no metadata")
        if spec.kind == "constant" and spec.target not in program.constants:
            raise BrokenProgramError(f"{name}: input {spec.name} names a constant {spec.target} that is not there")


def _has_calls(program: Program, name: str) -> None:
    structures, called = program.structures(), set()
    for node in program.root.graph.nodes:
        if node.op == "call_module":
            target = str(node.target)
            if target not in structures:
                raise BrokenProgramError(f"{name}: {node.name} calls {target}, which is not there")
            called.add(target)
            wanted = len(structures[target].graph.find_nodes(op="placeholder"))
            if len(node.args) != wanted:
                raise BrokenProgramError(f"{name}: {node.name} gives {target} {len(node.args)} of {wanted} arguments")
        elif node.op == "call_function" and node.target is operator.getitem:
            source, position = node.args
            made = _results(structures[str(source.target)]) if source.op == "call_module" else None
            if made is not None and position >= made:
                raise BrokenProgramError(f"{name}: {node.name} takes result {position} of {made} of {source.target}")
    for dead in sorted(set(structures) - called):
        raise BrokenProgramError(f"{name}: nothing calls {dead}")


def _results(structure: fx.GraphModule) -> int:
    return len(sequence_of(structure.graph.output_node().args[0]))
