"""Shared by the tests of the partitioner: captures a zoo model once and runs it on simulated meshes."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from zoo import more as zoo_more
from zoo import transformers as zoo

from xdit_compile.capture.capture import capture
from xdit_compile.compiler import Analysis
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.choose.rows import choose_rows
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.local.layout import Chosen, Layout
from xdit_compile.passes.partition.program import Partitioned, partition
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import SEQUENCE
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

CASES = {**zoo.MODELS, **zoo_more.MORE}


@dataclasses.dataclass(frozen=True)
class Captured:
    """A zoo model with one call, its own result and its typed program."""

    module: nn.Module
    args: tuple
    kwargs: dict
    expected: list[torch.Tensor]
    inference: Inference

    def analysis(self, plan: Plan) -> Analysis:
        return Analysis(self.inference.program, self.inference, choose_units(self.inference, plan))


@functools.lru_cache(maxsize=8)
def captured(name: str) -> Captured:
    case = CASES[name]
    module = case.build()
    args, kwargs = case.inputs()
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
    return Captured(module, args, kwargs, expected, infer(capture(module, args, kwargs), rulebook()))


def partition_all(inference: Inference, plan: Plan, units: Any = None) -> list[Partitioned]:
    """The programs of all ranks of a simulated mesh."""
    chosen = choose_units(inference, plan) if units is None else {SEQUENCE: units}
    return _every_rank(inference, plan, chosen, gather=True)


def partition_rows(inference: Inference, plan: Plan, gather: bool = True) -> list[Partitioned]:
    """The same for an autoencoder, which is split by rows."""
    return _every_rank(inference, plan, choose_rows(inference, plan), gather)


def _every_rank(inference: Inference, plan: Plan, chosen: Chosen, gather: bool) -> list[Partitioned]:
    layouts = [Layout.of(plan, Mesh.simulated(plan, rank), chosen) for rank in range(plan.world_size)]
    return [partition(inference, layout, gather) for layout in layouts]


def worst_difference(found: Any, expected: list[Any]) -> float:
    """Greatest difference of any tensor relative to its greatest value."""
    worst = 0.0
    for one, other in zip(pytree.tree_leaves(found), expected, strict=True):
        if isinstance(other, torch.Tensor):
            assert one.shape == other.shape and one.dtype == other.dtype
            difference = ((one - other).abs().max() / other.abs().max()).item()
            worst = max(worst, difference if difference == difference else math.inf)
    return worst


def run_split(model: Captured, plan: Plan, units: Any = None) -> tuple[float, list[Partitioned]]:
    """Worst difference over all ranks, and their programs."""
    ranks = partition_all(model.inference, plan, units)
    results = run_simulated([rank.program for rank in ranks], model.module, model.args, model.kwargs)
    return max(worst_difference(result, model.expected) for result in results), ranks
