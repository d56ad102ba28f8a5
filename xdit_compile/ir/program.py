"""A captured denoiser: a root graph that only wires together calls of functional ATen graphs, each kept once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .kept_modules import KeptModule
from .results import Template


@dataclasses.dataclass(frozen=True)
class WeightSlice:
    """The positions that are kept of one dim, as runs of ``(start, stop)`` in order."""

    dim: int
    runs: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """How many positions are kept."""
        return sum(stop - start for start, stop in self.runs)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """These positions of a tensor; a view where they are one run."""
        parts = [tensor.narrow(self.dim, start, stop - start) for start, stop in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


Kind = Literal["parameter", "buffer", "constant", "user", "patch", "shared", "state", "incoming", "joined"]


@dataclasses.dataclass(frozen=True)
class Input:
    """One placeholder of the root graph.

    ``target`` is a qualified name in the module for a parameter or buffer, a key of ``Program.constants`` for a
    constant, and for a user input the position among the flat leaves of ``(args, kwargs)``; of a ``patch`` the program
    takes the positions of one patch alone. What is ``shared`` another program computed, by the name that the captured
    value has. A ``state`` is a tensor that stays from call to call, by a name that all programs of one module share;
    what is ``incoming`` for it the call before asked other ranks for. Of a parameter or buffer with ``pieces`` the
    program takes only these, one after the other. What is ``joined`` are its ``members``, parameters, one below the
    other along the first dim.
    """

    name: str
    kind: Kind
    target: str | int
    pieces: tuple[WeightSlice, ...] = ()
    members: tuple[Input, ...] = ()

    def sizes(self, whole: Sequence[int]) -> list[int]:
        """The shape that is taken of a tensor of shape ``whole``."""
        sizes = list(whole)
        for piece in self.pieces:
            sizes[piece.dim] = piece.size
        return sizes


@dataclasses.dataclass
class Program:
    """Prologue, blocks and epilogue of one module for one signature.

    ``root`` is a GraphModule whose placeholders stand in the order of ``inputs`` and carry ``meta["val"]`` fakes. Each
    of its computing nodes is a ``call_module`` whose target is one entry of ``structures`` (several calls may share it)
    or an ``operator.getitem`` on such a call; its output is a flat tuple. A call carries ``meta["path"]``, the path of
    the module it stands for (``""`` for what lies between blocks), and ``meta["repeated"]``, whether it belongs to a
    list of repeated blocks. Every structure is a functional ATen GraphModule: placeholders, ``call_function`` nodes and
    one flat tuple as output, each node with ``meta["val"]``; weights come in as arguments.

    ``outcome`` says how the `Outcome` of a call is made of the root's output tuple. ``kept`` are the
    modules that structures call by name.
    """

    root: fx.GraphModule
    inputs: tuple[Input, ...]
    constants: dict[str, torch.Tensor]
    in_spec: pytree.TreeSpec
    outcome: Template
    guards: tuple[Guard, ...] = ()
    how: str = ""
    kept: tuple[KeptModule, ...] = ()

    def parameters(self) -> list[Input]:
        """The parameters that the program takes, those that it takes as one tensor with others included."""
        return [each for spec in self.inputs for each in (spec.members or (spec,)) if each.kind == "parameter"]

    def structures(self) -> dict[str, fx.GraphModule]:
        """The distinct structures by name."""
        return {name: child for name, child in self.root.named_children() if isinstance(child, fx.GraphModule)}

    def calls(self) -> list[fx.Node]:
        """The calls of structures, in the order they run."""
        return [node for node in self.root.graph.nodes if node.op == "call_module"]


@dataclasses.dataclass(frozen=True)
class Guard:
    """A value that the capture baked in: a call whose flat input ``position`` has another is captured anew."""

    position: int
    value: torch.Tensor
