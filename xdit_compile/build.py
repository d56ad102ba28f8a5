"""From a module and one call of it to what this rank runs: capture, infer, choose, partition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from .capture import capture
from .mesh import Mesh
from .passes.batch import choose_batch
from .passes.features import choose_features
from .passes.infer import Inference, infer
from .passes.layout import BATCH, SEQUENCE, TENSOR, Chosen, Layout
from .passes.program_partition import Partitioned, partition
from .passes.rulebook import rulebook
from .passes.tokens import choose_tokens
from .plan import Plan
from .program import Program


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What holds for every rank: the captured program, its axes, and the units that the plan splits."""

    program: Program
    inference: Inference
    units: Chosen


def analyse(
    module: nn.Module, plan: Plan, args: tuple, kwargs: dict, *, forward: Callable[..., Any] | None = None,
    check: bool = True, choose: Callable[[Inference, Plan], Chosen] | None = None, run: bool = True,
) -> Analysis:  # fmt: skip
    """Capture one call of a module, name its axes and choose what to split.

    Args:
        choose: in place of `choose_units`.
        forward, check, run: see `capture`.

    Raises:
        CaptureError: when no capture agrees with the module.
    """
    program = capture(module, args, kwargs, forward=forward, check=check, run=run)
    inference = infer(program, rulebook())
    return Analysis(program, inference, (choose or choose_units)(inference, plan))


def choose_units(inference: Inference, plan: Plan) -> Chosen:
    """What each kind of parallelism in the plan splits; a batch of one is not split, its calls are shared instead."""
    return {
        BATCH: choose_batch(inference, plan.cfg),
        SEQUENCE: choose_tokens(inference, plan),
        TENSOR: choose_features(inference, plan),
    }


def place(analysis: Analysis, plan: Plan, mesh: Mesh, gather: bool = True) -> Partitioned:
    """The program of one rank of ``mesh``; without ``gather`` its results are this rank's part.

    Raises:
        PartitionError: where something cannot be split and may not be gathered.
    """
    return partition(analysis.inference, Layout.of(plan, mesh, analysis.units), gather)
