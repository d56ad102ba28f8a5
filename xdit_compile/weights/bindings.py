"""What programs take of a module, looked up once for as long as the module stays as it is."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import fx

from xdit_compile.ir.program import Input, Program
from xdit_compile.ir.versions import version_of

OF_MODULE = ("parameter", "buffer", "joined")


class Finds(Protocol):
    """Where tensors of a module are found."""

    def find(self, spec: Input) -> torch.Tensor:
        """The tensor for a parameter or buffer of a program."""
        ...

    def whole(self, spec: Input) -> torch.Tensor:
        """The tensor of which the program may take a slice, or what stands in its place."""
        ...


class Bound:
    """The tensors for a program's placeholders, None for each that a call gives.

    Args:
        given: the places of the latter, with what they are for.
    """

    def __init__(self, program: Program, weights: Finds):
        self.given = [(at, each) for at, each in enumerate(program.inputs) if each.kind not in (*OF_MODULE, "constant")]
        self.tensors: list[torch.Tensor | None] = [_found(each, program, weights) for each in program.inputs]
        cut = [weights.whole(one) for each in program.inputs for one in each.members or (each,) if _is_made(each, one)]
        self._wholes = [each for each in cut if not each.is_meta]
        self._addresses, self._versions = self._states()

    def fits(self) -> bool:
        """Whether slices and joined tensors are still those of the tensors that they were made of."""
        return not self._wholes or (self._addresses, self._versions) == self._states()

    def _states(self) -> tuple[list[int], list[int | None]]:
        return [each.data_ptr() for each in self._wholes], [version_of(each) for each in self._wholes]


class Bindings:
    """What is bound of all programs of one module.

    Kept is it for a module of which somebody sees that nothing was put in the place of another (`of_state`).
    """

    def __init__(self) -> None:
        self._state: object = None
        self._known: weakref.WeakKeyDictionary[fx.GraphModule, Bound] = weakref.WeakKeyDictionary()

    def of_state(self, state: object) -> None:
        """The module is as this object stands for, by its identity; None where nobody looks."""
        if state is not self._state:
            self._state = state
            self.forget()

    def forget(self) -> None:
        """Look everything up anew."""
        self._known.clear()

    def of(self, program: Program, weights: Finds) -> Bound:
        """What a program takes of the module."""
        known = self._known.get(program.root)
        if known is None or not known.fits():
            known = Bound(program, weights)
            if self._state is not None:
                self._known[program.root] = known
        return known


def _is_made(spec: Input, member: Input) -> bool:
    """Whether what a program takes for an input is another tensor than the module has."""
    return spec.kind in OF_MODULE and bool(spec.members or member.pieces)


def _found(spec: Input, program: Program, weights: Finds) -> torch.Tensor | None:
    if spec.kind in OF_MODULE:
        return weights.find(spec)
    return program.constants[str(spec.target)] if spec.kind == "constant" else None
