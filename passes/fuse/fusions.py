"""The passes that change how fast something runs and nothing else, in their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator

import torch

from xdit_compile.ir.program import Program
from xdit_compile.kernels.triton_jit import TRITON
from xdit_compile.passes.across import join_norms as rotating

from . import hoist_linears as hoisting
from . import join_linears as joining
from .fold_activations import fold_activations
from .hoist_linears import hoist_linears
from .join_edges import join_edges
from .late_biases import late_biases
from .norm_rope import norm_rope
from .pack_heads import pack_heads
from .selection import Chooser
from .split_concatenations import split_concatenations
from .spread_norms import spread_norms
from .timings import Timings

OLDEST = (8, 0)
"""The first cards that compute in bfloat16; kernels are compiled for these and later ones in the tests."""


@dataclasses.dataclass(frozen=True)
class OptionalPass:
    """A pass that a plan can leave out.

    Args:
        name: by which it is left out.
        run: the pass, which asks a chooser at every site.
        told: says of a program what the pass does to it, asking likewise.
        kinds: of devices that it is for; all for None.
        unsupported: why a device of such a kind cannot run what it puts in; None where it can.
        needs_timing: whether it changes nothing that was not timed on the device, as a product of our own would.
    """

    name: str
    run: Callable[[Program, Chooser], Program]
    told: Callable[[Program, Chooser], str]
    kinds: tuple[str, ...] | None = ("cuda",)
    unsupported: Callable[[torch.device], str | None] = lambda device: None
    needs_timing: bool = False

    def chooser(self, timings: Timings) -> Chooser:
        """What chooses its sites."""
        return Chooser(self.name, timings, self.needs_timing)

    def asked_for(self, without: Collection[str], device: torch.device) -> bool:
        """Whether it is for a device of this kind, and the plan does not leave it out."""
        return self.name not in without and (self.kinds is None or device.type in self.kinds)

    def wanted(self, without: Collection[str], device: torch.device) -> bool:
        """Whether it runs for a device, in a plan that leaves some out."""
        return self.asked_for(without, device) and self.unsupported(device) is None


def no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on a device."""
    if not TRITON:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "its kernels were never tried on AMD's cards"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < OLDEST:
        return f"its kernels need a card of sm_{OLDEST[0]}{OLDEST[1]} or later"
    return None


def no_epilogue(device: torch.device) -> str | None:
    """Why products do not apply activations on a device."""
    return None if torch.version.hip is None else "only cuBLASLt is known to do that"


SPREAD_NORMS = OptionalPass(spread_norms.name, spread_norms, spread_norms.told)
LATE_BIASES = OptionalPass(late_biases.name, late_biases, late_biases.told)
JOIN_EDGES = OptionalPass(join_edges.name, join_edges, join_edges.told)
FOLD_ACTIVATIONS = OptionalPass(fold_activations.name, fold_activations, fold_activations.told, unsupported=no_epilogue)
SPLIT_CONCATENATIONS = OptionalPass(split_concatenations.name, split_concatenations, split_concatenations.told)
NORM_ROPE = OptionalPass(norm_rope.name, norm_rope, norm_rope.told, unsupported=no_triton)
PACK_HEADS = OptionalPass(pack_heads.name, pack_heads, pack_heads.told, unsupported=no_triton)
JOIN_LINEARS = OptionalPass("join_linears", joining.join_linears, joining.told, kinds=None)
JOIN_NORMS = OptionalPass(
    "join_norms",
    lambda program, chooser: rotating.join_norms(program),
    lambda program, chooser: rotating.told(program),
)
IN_ORDER = (
    SPREAD_NORMS, LATE_BIASES, JOIN_EDGES, FOLD_ACTIVATIONS, SPLIT_CONCATENATIONS, NORM_ROPE, PACK_HEADS, JOIN_LINEARS,
    JOIN_NORMS,
)  # fmt: skip


def told(
    program: Program, without: Collection[str], device: torch.device, timings: Timings | None = None
) -> Iterator[str]:  # fmt: skip
    """What each of them does to a program, one after the other.

    Args:
        without: those that are left out.
        device: what they are for.
        timings: what was measured there.
    """
    if hoist_linears.__name__ not in without:
        yield hoisting.told(program)
    for each in (each for each in IN_ORDER if each.asked_for(without, device)):
        reason = each.unsupported(device)
        if reason is not None:
            yield f"{each.name}: left out, as {reason}"
            continue
        chooser = each.chooser(timings or Timings())
        yield each.told(program, chooser)
        program = each.run(program, chooser)
