"""What one signature runs on this rank of a pipeline of stages, and what it takes to make it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xdit_compile.capture.interpret import bind
from xdit_compile.ir.patch_layout import PatchLayout
from xdit_compile.ir.program import Program
from xdit_compile.passes.stages.assign_stages import Stage
from xdit_compile.passes.stages.stage_programs import StagePrograms
from xdit_compile.runtime.generation import BranchState
from xdit_compile.weights.weights import Weights

from .stepped_call import SteppedCall

Run = Callable[..., tuple[Any, ...]]
Kept = dict[str | int, torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Flow(SteppedCall):
    """What one signature runs on this rank: its stage of the program of all tokens, and of that of each patch.

    Args:
        pipeline: the programs.
        common: runs what all patches need alike, and ``runs`` the others, that of all tokens first.
        places: the stages of blocks by their paths.
    """

    pipeline: StagePrograms
    common: Run
    runs: tuple[Run, ...]
    places: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def parts(self) -> Mapping[str, tuple[Program, Run]]:
        full, *patches = zip((self.pipeline.full, *self.pipeline.patches), self.runs, strict=True)
        named = {f"patch_{number}": (stage.program, run) for number, (stage, run) in enumerate(patches)}
        return {"full": (full[0].program, full[1]), "common": (self.pipeline.common, self.common), **named}

    @property
    def facts(self) -> dict[str, Any]:
        stages = self.pipeline
        return {
            "stage": stages.stage,
            "places": dict(self.places),
            "shared": stages.shared,
            "varying": stages.varying,
            "inputs": {position: _laid(layout) for position, layout in stages.inputs.items()},
            "results": tuple(map(_laid, stages.results)),
            "wholes": _forms(stages.wholes),
            "stages": tuple((_forms(each.received), _forms(each.sent)) for each in (stages.full, *stages.patches)),
        }

    @property
    def patches(self) -> range:
        """The patches, by number."""
        return range(len(self.pipeline.patches))

    def likes(self, patch: int) -> list[torch.Tensor]:
        """Tensors of the shapes and dtypes of the results of one patch, on the meta device."""
        return self.pipeline.likes(patch)

    @property
    def stepping(self) -> frozenset[int]:
        """What every patch has its own part of."""
        inputs = self.pipeline.inputs.items()
        return frozenset(position for position, layout in inputs if all(map(len, layout.positions)))

    @property
    def kept(self) -> Mapping[str | int, torch.Tensor]:
        return {name: like for name, (_, like) in self.pipeline.taken("state").items()}

    def beside(self, weights: Weights, leaves: list[Any], branch: BranchState) -> Kept:
        """What the programs of patches take beside inputs that vary: states, and what all patches need alike."""
        alike = self.common(*bind(self.pipeline.common, weights, leaves))
        return {**branch.states, **dict(zip(self.pipeline.shared, alike, strict=True))}


def stages_of(programs: Mapping[str, Program], facts: Mapping[str, Any]) -> StagePrograms:
    """The stage that the programs and facts of a `Flow` say."""
    patches = [programs[f"patch_{number}"] for number in range(len(facts["stages"]) - 1)]
    stages = [
        Stage(program, _likes(received), _likes(sent))
        for program, (received, sent) in zip((programs["full"], *patches), facts["stages"], strict=True)
    ]
    inputs = {position: PatchLayout(*layout) for position, layout in facts["inputs"].items()}
    results = tuple(PatchLayout(*layout) for layout in facts["results"])
    return StagePrograms(
        facts["stage"], stages[0], programs["common"], facts["shared"], tuple(stages[1:]), facts["varying"], inputs,
        results, _likes(facts["wholes"]),
    )  # fmt: skip


def _laid(layout: PatchLayout) -> tuple[int, tuple[tuple[int, ...], ...]]:
    return layout.back, layout.positions


def _forms(tensors: Sequence[torch.Tensor]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    return tuple((tuple(each.shape), each.dtype) for each in tensors)


def _likes(forms: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in forms)
