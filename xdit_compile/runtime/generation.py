"""What denoisers keep between the steps of one generation, and never beyond it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch

from xdit_compile.errors import UsageError
from xdit_compile.kernels.collectives.process_groups import settle
from xdit_compile.runtime.tensors.patched_tensor import Part
from xdit_compile.runtime.tensors.recognized import Recognized

States = dict[str | int, torch.Tensor]


@dataclasses.dataclass
class BranchState:
    """One branch of guidance: the calls of a denoiser that differ in nothing but the step.

    Args:
        fresh: makes the states that it begins with.
        index: its place among the branches of one denoiser, in the order of their first calls.
        steps: how many calls it has seen.
        mixed: whether two of these calls were of one step, so that what is kept belongs to neither.
    """

    fresh: Callable[[], States]
    index: int = 0
    steps: int = 0
    mixed: bool = False
    _latest: tuple[torch.Tensor, ...] = ()
    _asked: tuple[Part, ...] = ()

    @functools.cached_property
    def states(self) -> States:
        """What its programs keep, by name; made where they are first asked for."""
        return self.fresh()

    def settle(self, parts: tuple[Part, ...]) -> None:
        """Get what the last step's call was given, where it comes here, and remember what this one's is.

        What no rank reads would be put off from step to step, with all that it is made of.
        """
        for part in self._asked:
            part.value()
        self._asked = parts

    def enter(self, varying: tuple[torch.Tensor, ...]) -> None:
        """Note a call, by its inputs that change from step to step: the same ones again are no other step."""
        again = bool(varying) and len(varying) == len(self._latest)
        if again and all(one is other for one, other in zip(varying, self._latest, strict=True)) and not self.mixed:
            self.mixed = True
            warnings.warn(
                "the denoiser was called twice in one step with inputs that do not tell the calls apart; "
                "all tokens are computed in every call from here on",
                stacklevel=2,
            )
        self._latest = varying
        self.steps += 1

    def finish(self) -> None:
        """Wait for what is on its way, as nothing will ask for it."""
        for tensor in vars(self).get("states", {}).values():
            settle(tensor, "an exchange of the last step")


class Generation:
    """The calls of the denoisers of one pipeline from its start to its end; outside of one, nothing is kept.

    Args:
        warmup: steps that a generation has at least. One that has no more is exact to its end, however often a
            scheduler has the denoiser called in a step; in others every call of a branch counts as a step.
    """

    def __init__(self, warmup: int = 0) -> None:
        self.warmup = warmup
        self.number = 0
        self.active = self._all_wait = False
        self._branches: dict[tuple[int, Hashable, str], BranchState] = {}
        self._values = Recognized()

    @contextmanager
    def running(self, steps: int | None = None) -> Iterator[None]:
        """One generation of so many steps, however it ends; one inside of another takes nothing from it.

        Raises:
            UsageError: for fewer steps than the warm-up takes.
        """
        if steps is not None and steps < self.warmup:
            raise UsageError(
                f"warmup_steps={self.warmup} but this generation has {steps} steps; "
                f"use warmup_steps={steps} for an exact one, or more steps"
            )
        around = self.active, self._all_wait, self._branches, self._values
        self.number += 1
        self.active, self._all_wait, self._branches, self._values = True, steps == self.warmup, {}, Recognized()
        try:
            yield
            for branch in self._branches.values():
                branch.finish()
        finally:
            self.active, self._all_wait, self._branches, self._values = around

    def waits(self, branch: BranchState) -> bool:
        """Whether the call that a branch was entered with takes nothing from a call before."""
        return branch.steps <= self.warmup or branch.mixed or self._all_wait or not self.active

    def branches(self, denoiser: object) -> int:
        """How many branches of a denoiser this generation has had so far."""
        return sum(key[0] == id(denoiser) for key in self._branches)

    def branch(
        self, denoiser: object, program: Hashable, constants: list[torch.Tensor], fresh: Callable[[], States]
    ) -> BranchState:
        """The branch of a call, by what does not change from step to step.

        Args:
            denoiser: tells denoisers apart.
            program: tells the programs of one apart; never used again.
            constants: the inputs that make a branch.
            fresh: makes the states that a new branch begins with.
        """
        if not self.active:
            return BranchState(fresh)
        key = (id(denoiser), program, " ".join(map(self._values.name, constants)))
        if key not in self._branches:
            self._branches[key] = BranchState(fresh, self.branches(denoiser))
        return self._branches[key]
