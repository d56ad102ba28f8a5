"""The passes that change how fast something runs and nothing else, in their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator

import torch

from xdit_compile.ir.program import Program

from . import join_linears as joining
from .fold_activations import fold_activations
from .norm_rope import norm_rope
from .pack_heads import pack_heads
from .split_concatenations import split_concatenations


@dataclasses.dataclass(frozen=True)
class OptionalPass:
    """A pass that a plan can leave out.

    Args:
        name: by which it is left out.
        run: the pass.
        told: says of a program what the pass does to it.
        kinds: of devices that it is for; all for None.
    """

    name: str
    run: Callable[[Program], Program]
    told: Callable[[Program], str]
    kinds: tuple[str, ...] | None = ("cuda",)

    def wanted(self, without: Collection[str], device: torch.device) -> bool:
        """Whether it runs for a device, in a plan that leaves some out."""
        return self.name not in without and (self.kinds is None or device.type in self.kinds)


FOLD_ACTIVATIONS = OptionalPass(fold_activations.name, fold_activations, fold_activations.told)
SPLIT_CONCATENATIONS = OptionalPass(split_concatenations.name, split_concatenations, split_concatenations.told)
NORM_ROPE = OptionalPass(norm_rope.name, norm_rope, norm_rope.told)
PACK_HEADS = OptionalPass(pack_heads.name, pack_heads, pack_heads.told)
JOIN_LINEARS = OptionalPass("join_linears", joining.join_linears, joining.told, kinds=None)
IN_ORDER = (FOLD_ACTIVATIONS, SPLIT_CONCATENATIONS, NORM_ROPE, PACK_HEADS, JOIN_LINEARS)


def told(program: Program, without: Collection[str], device: torch.device) -> Iterator[str]:
    """What each of them does to a program, one after the other."""
    for each in IN_ORDER:
        if each.wanted(without, device):
            yield each.told(program)
            program = each.run(program)
