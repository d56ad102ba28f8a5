"""Passes that are for GPUs compute the same as the module, under every split; their operators run on the CPU here."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from splitting import CASES, captured

from xdit_compile import Plan
from xdit_compile.compiler import Compilation, compiled, run_passes
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

CPU = torch.device("cpu")
GPU = torch.device("cuda")
TOLERANCE = 2e-5
DEGREES: tuple[dict[str, int], ...] = ({}, {"ulysses": 3}, {"tensor": 2}, {"ring": 2, "tensor": 3}, {"ulysses": 8})
QUICK = ("flux", "cogvideox", "wan")


def fused(name: str, plan: Plan, rank: int) -> Compilation:
    """What a rank would compile for a GPU."""
    state = compiled(
        captured(name).analysis(plan), plan, Mesh.simulated(plan, rank), until="hoist_positions", device=CPU
    )
    return run_passes(dataclasses.replace(state, device=GPU), after="hoist_positions", until="join_linears")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in sorted(CASES)
        if name != "hidream"
    ],
)
def test_the_same_is_computed_under_every_split(name: str) -> None:
    model = captured(name)
    for degrees in DEGREES:
        plan = Plan(**degrees)
        programs = [fused(name, plan, rank).programs["call"] for rank in range(plan.world_size)]
        for result in run_simulated(programs, model.module, model.args, model.kwargs):
            for one, like in zip(torch.utils._pytree.tree_leaves(result), model.expected, strict=True):
                assert (one - like).abs().max() <= TOLERANCE * like.abs().max()
