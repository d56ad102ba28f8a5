"""What ``explain`` answers with for a pipeline: the blocks, weights, states and transfers of every stage."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from xdit_compile.compiler import Analysis, place_stage, separated
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.passes.stages.stage_programs import StagePrograms
from xdit_compile.plan import Plan

from .attention_report import attention_line
from .counted_report import CountedReport, rendered
from .report import lines_of_making, printed


@dataclasses.dataclass(frozen=True)
class StageEntry:
    """One stage, on the first of its ranks: repeated blocks, elements of parameters, and bytes.

    ``states`` stay on the rank from step to step, for one branch of guidance; ``sent`` leaves it in one call after the
    warm-up, all patches together.
    """

    stage: int
    blocks: int
    parameters: int
    states: int
    sent: int


@dataclasses.dataclass(frozen=True)
class PipelineReport:
    """How a plan cuts one call of a module into stages and patches.

    ``patches`` are the positions of each patch along the dim of the first result that is cut; ``shared`` counts the
    elements of parameters that several stages hold, because they come before or after the blocks; ``ready`` says how
    long the call took to be ready, and where its graphs came from; ``attention`` who computes it, and whether exactly;
    ``counted`` what a card would run of one rank's programs, where one was asked for.
    """

    captured_by: str
    patches: tuple[int, ...]
    stages: tuple[StageEntry, ...]
    parameters: int
    shared: int
    seconds: tuple[tuple[str, float], ...] = dataclasses.field(default=(), compare=False)
    ready: str = dataclasses.field(default="", compare=False)
    attention: str = ""
    counted: CountedReport | None = None

    def __str__(self) -> str:
        return printed(_rendered(self))

    __repr__ = __str__


def pipeline_report(analysis: Analysis, plan: Plan, ready: str = "") -> PipelineReport:
    """Sum up the stages of a plan.

    Raises:
        PartitionError: as `place_stage` does.
    """
    analysis = separated(analysis, plan)
    ranks = Mesh.simulated(plan, 0).peers("pipefusion")
    stages = [place_stage(analysis, plan, Mesh.simulated(plan, rank), {}) for rank in ranks]
    held = [_parameters(stage) for stage in stages]
    everything = {
        name: math.prod(whole.shape) for stage in stages for name, (_, whole) in stage.taken("parameter").items()
    }
    several = [name for name in everything if sum(name in one for one in held) > 1]
    entries = [
        StageEntry(
            stage.stage,
            sum(bool(call.meta.get("repeated")) for call in stage.full.program.calls()),
            sum(parameters.values()),
            _states(stage),
            sum(tensor.numel() * tensor.element_size() for patch in stage.patches for tensor in patch.sent),
        )
        for stage, parameters in zip(stages, held, strict=True)
    ]
    sizes = tuple(len(positions) for positions in stages[0].results[0].positions)
    return PipelineReport(
        captured_by=analysis.program.how,
        patches=sizes,
        stages=tuple(entries),
        parameters=sum(everything.values()),
        shared=sum(everything[name] for name in several),
        seconds=analysis.seconds,
        ready=ready,
        attention=attention_line(plan.attention),
    )


def _parameters(stage: StagePrograms) -> dict[str | int, int]:
    taken = stage.taken("parameter")
    return {name: math.prod(given.sizes(whole.shape)) for name, (given, whole) in taken.items()}


def _states(stage: StagePrograms) -> int:
    return sum(like.numel() * like.element_size() for _, like in stage.taken("state").values())


def _rendered(summary: PipelineReport) -> list[Any]:
    from rich.table import Table

    sizes = ", ".join(map(str, summary.patches))
    head = (
        f"{len(summary.stages)} stages, {len(summary.patches)} patches of {sizes} rows; "
        f"captured by {summary.captured_by}; {summary.parameters:,} parameters, {summary.shared:,} of them "
        "on several stages"
    )
    table = Table(title="stages", title_justify="left")
    for column in ("stage", "blocks", "parameters", "MiB of states a branch", "MiB sent a call"):
        table.add_column(column, justify="right")
    for entry in summary.stages:
        table.add_row(
            str(entry.stage), str(entry.blocks), f"{entry.parameters:,}", f"{entry.states / 2**20:.2f}",
            f"{entry.sent / 2**20:.2f}",
        )  # fmt: skip
    counted = rendered(summary.counted) if summary.counted else []
    return [head, summary.attention, *lines_of_making(summary.seconds, summary.ready), table, *counted]
