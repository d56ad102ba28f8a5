"""PipeFusion together with other ways to split, on a simulated mesh: every rank's programs with the states it keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from splitting import Captured
from torch.utils import _pytree as pytree

from xdit_compile.capture.state.containers import Outcome
from xdit_compile.compiler import place_stage, separated
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Program
from xdit_compile.ir.results import Template
from xdit_compile.passes.stages.stage_programs import StagePrograms
from xdit_compile.plan import Plan
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

Kept = dict[str | int, torch.Tensor]


class Simulated:
    """All ranks of a plan with patches and one stage, and what they keep from call to call."""

    def __init__(self, model: Captured, plan: Plan):
        analysis = separated(model.analysis(plan), plan)
        self.model = model
        self.ranks = [place_stage(analysis, plan, Mesh.simulated(plan, rank), {}) for rank in range(plan.world_size)]
        self.states = [_states(pipeline) for pipeline in self.ranks]

    def all_tokens(self, args: tuple, kwargs: dict) -> list[list[torch.Tensor]]:
        """The results of every rank for a call that computes all tokens."""
        return self._run([pipeline.full.program for pipeline in self.ranks], args, kwargs, self.states)

    def in_patches(self, args: tuple, kwargs: dict) -> list[list[torch.Tensor]]:
        """The same patch by patch, on what earlier calls left."""
        leaves = pytree.tree_leaves((args, kwargs))
        shared = self._run([pipeline.common for pipeline in self.ranks], args, kwargs, [{}] * len(self.ranks))
        kept = [
            {**states, **dict(zip(pipeline.shared, found, strict=True))}
            for pipeline, states, found in zip(self.ranks, self.states, shared, strict=True)
        ]
        wholes: list[list[torch.Tensor]] = [[] for _ in self.ranks]
        for patch in range(len(self.ranks[0].patches)):
            inputs = self.ranks[0].inputs.items()
            own = {at: _take(leaves[at], lie.back, lie.positions[patch]) for at, lie in inputs}
            programs = [pipeline.patches[patch].program for pipeline in self.ranks]
            found = self._run(programs, args, kwargs, [{**each, **own} for each in kept])
            for rank, results in enumerate(found):
                wholes[rank] = wholes[rank] or [torch.full_like(x, torch.nan) for x in self.model.expected]
                for lie, whole, part in zip(self.ranks[rank].results, wholes[rank], results, strict=True):
                    assert part.shape == lie.like(whole, patch).shape
                    whole.index_copy_(whole.ndim - lie.back, torch.tensor(lie.positions[patch], dtype=torch.long), part)
        return wholes

    def _run(self, programs: list[Program], args: tuple, kwargs: dict, kept: list[Kept]) -> list[Any]:
        results = [len(program.root.graph.output_node().args[0]) for program in programs]
        plain = [
            dataclasses.replace(program, outcome=Template.of(Outcome([torch.empty(0)] * count)))
            for program, count in zip(programs, results, strict=True)
        ]
        return run_simulated(plain, self.model.module, args, kwargs, kept=kept)


def _states(pipeline: StagePrograms) -> Kept:
    likes = {name: like for name, (_, like) in pipeline.taken("state").items()}
    return {name: torch.full(like.shape, torch.nan, dtype=like.dtype) for name, like in likes.items()}


def _take(whole: torch.Tensor, back: int, positions: tuple[int, ...]) -> torch.Tensor:
    return whole.index_select(whole.ndim - back, torch.tensor(positions, dtype=torch.long))
