"""Bytes that a call of a denoiser sends to other ranks, counted in the graphs that this rank runs for it."""

from __future__ import annotations

import weakref

import torch
from torch import fx

from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.arguments import overload_of
from xdit_compile.ir.program import Program
from xdit_compile.kernels.collectives.registration import collective, elements_sent
from xdit_compile.passes.memory.on_meta import Shapes, shapes_of
from xdit_compile.runtime.compiled_call import CompiledCall


class Traffic:
    """Counts what the calls of a runner send.

    Calls that run one of several programs, as those of methods that keep something from step to step, are not counted,
    nor are transfers between stages of a pipeline, which are in no graph.

    Args:
        mesh: with this rank's place.

    Attributes:
        sent: bytes, of all calls so far.
    """

    def __init__(self, mesh: Mesh):
        self.sent = 0
        self._mesh = mesh
        self._counted: weakref.WeakKeyDictionary[CompiledCall, int] = weakref.WeakKeyDictionary()

    def ran(self, call: CompiledCall | None) -> None:
        """Count a call; None is one that ran whole on every rank."""
        if call is None:
            return
        if call not in self._counted:
            (program, *others) = call.programs
            self._counted[call] = 0 if others else sent_by(program, self._mesh)
        self.sent += self._counted[call]


def sent_by(program: Program, mesh: Mesh) -> int:
    """Bytes that leave this rank in one run of a program; a structure counts as it is called last."""
    shapes = shapes_of(program)
    structures = program.structures()
    of_structure = {name: _of_graph(each.graph, shapes, mesh) for name, each in structures.items()}
    return sum(of_structure[str(call.target)] for call in program.calls())


def _of_graph(graph: fx.Graph, shapes: Shapes, mesh: Mesh) -> int:
    return sum(_sent(node, shapes, mesh) for node in graph.nodes if collective(node.target) is not None)


def _sent(node: fx.Node, shapes: Shapes, mesh: Mesh) -> int:
    op = overload_of(node)
    args = fx.map_arg(node.args, lambda each: shapes[each])
    role = str(args[[argument.name for argument in op._schema.arguments].index("group")])
    roles = {known: dimensions for dimensions, known in mesh.groups.items()}
    dimensions = ("distrifusion",) if role and role == mesh.behind else roles.get(role, ())
    tensor = next(each for each in args if isinstance(each, torch.Tensor))
    return elements_sent(op, args, mesh.size(dimensions), mesh.index(dimensions)) * tensor.dtype.itemsize
