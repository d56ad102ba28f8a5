"""From one call of a module to what this rank runs: the passes in order, and the loop that runs them."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from xdit_compile.backends.base import Backend
from xdit_compile.capture.capture import capture
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.program import Program
from xdit_compile.ir.verify_program import verify_program
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.axes.verify_axes import verify_axes
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.passes.fuse import fusions
from xdit_compile.passes.fuse.hoist_linears import hoist_linears
from xdit_compile.passes.fuse.timings import Timings
from xdit_compile.passes.local.layout import Chosen, Layout
from xdit_compile.passes.memory.tile_rows import in_strips
from xdit_compile.passes.partition.hide_exchanges import hide_exchanges
from xdit_compile.passes.partition.hoist_positions import hoist_positions
from xdit_compile.passes.partition.program import Partitioned, partition
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.passes.stages.choose_patches import cuts, varying
from xdit_compile.passes.stages.split_step_invariant import separate
from xdit_compile.passes.stages.stage_programs import PatchPrograms, StagePrograms, cut_stages, partition_patches

from .errors import UsageError
from .plan import Plan
from .plan.nearest import unknown

CHECK = "XDIT_COMPILE_CHECK"
"""Environment variable with which programs are looked at after every pass, as tests do."""
Run = Callable[..., tuple[Any, ...]]
Each = TypeVar("Each")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What holds for every rank: the captured program, its axes, the units that the plan splits; seconds of passes."""

    program: Program
    inference: Inference
    units: Chosen
    seconds: tuple[tuple[str, float], ...] = dataclasses.field(default=(), compare=False)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module, and how it is captured.

    Args:
        forward, check, run, watched: see `capture`.
    """

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    forward: Callable[..., Any] | None = None
    check: bool = True
    run: bool = True
    watched: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A call on its way from a module to what one rank runs.

    The first fields say what is wanted; passes fill in the others, each what its name says.

    Args:
        plan: what is split, and over how many.
        call: what is captured; None once it is.
        choose: says what of a program is split.
        mesh: whose rank the programs are for.
        gather: whether results are made whole; without it each rank has its part of them.
        budget: bytes beside weights that this rank may take; convolutions run in strips where that takes it.
        places: the stages of blocks, by their paths, of programs of the same module that were placed before.
        backend: what compiles.
        device: where what is compiled lies.
        timings: what was measured there of what optional passes can change.
        partitioned: this rank's programs by name: ``call``, or with DistriFusion ``waiting`` and ``stale``.
        runs: what computes each program.
        seconds: what each pass took.
    """

    plan: Plan
    call: Call | None = None
    choose: Callable[[Inference, Plan], Chosen] = choose_units
    mesh: Mesh | None = None
    gather: bool = True
    budget: int | None = None
    places: dict[str, int] = dataclasses.field(default_factory=dict)
    backend: Backend | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    timings: Timings = dataclasses.field(default_factory=Timings)
    program: Program | None = None
    inference: Inference | None = None
    units: Chosen | None = None
    partitioned: Mapping[str, Partitioned] = dataclasses.field(default_factory=dict)
    patches: PatchPrograms | None = None
    stages: StagePrograms | None = None
    runs: Mapping[str, Run] = dataclasses.field(default_factory=dict)
    seconds: tuple[tuple[str, float], ...] = ()

    @property
    def analysis(self) -> Analysis:
        """What the passes up to ``choose_units`` found."""
        assert self.program is not None and self.inference is not None and self.units is not None
        return Analysis(self.program, self.inference, self.units, self.seconds)

    @property
    def programs(self) -> dict[str, Program]:
        """All programs of the latest pass, by name."""
        if self.stages is not None:
            patches = _numbered([patch.program for patch in self.stages.patches])
            return {"full": self.stages.full.program, "common": self.stages.common, **patches}
        if self.patches is not None:
            return {"full": self.patches.full.program, **_numbered(self.patches.patches)}
        if self.partitioned:
            return {name: each.program for name, each in self.partitioned.items()}
        return {} if self.program is None else {"captured": self.program}


def _numbered(patches: Sequence[Each]) -> dict[str, Each]:
    return {f"patch_{at}": patch for at, patch in enumerate(patches)}


def _capture(state: Compilation) -> Compilation:
    assert state.call is not None
    call = state.call
    program = capture(
        call.module, call.args, call.kwargs,
        forward=call.forward, check=call.check, run=call.run, watched=call.watched,
    )  # fmt: skip
    return dataclasses.replace(state, program=program, call=None)


def _hoist_linears(state: Compilation) -> Compilation:
    assert state.program is not None
    return dataclasses.replace(state, program=hoist_linears(state.program))


def _infer_axes(state: Compilation) -> Compilation:
    assert state.program is not None
    return dataclasses.replace(state, inference=infer(state.program, rulebook()))


def _choose_units(state: Compilation) -> Compilation:
    assert state.inference is not None
    return dataclasses.replace(state, units=state.choose(state.inference, state.plan))


def _split_step_invariant(state: Compilation) -> Compilation:
    analysis = separated(state.analysis, state.plan)
    return dataclasses.replace(state, program=analysis.program, inference=analysis.inference, units=analysis.units)


def _partition(state: Compilation) -> Compilation:
    assert state.mesh is not None
    analysis, plan = state.analysis, state.plan
    if plan.patch_count > 1:
        patches = partition_patches(analysis.inference, analysis.units, plan, state.mesh)
        return dataclasses.replace(state, patches=patches)
    ways = {"waiting": False, "stale": True} if plan.distrifusion > 1 else {"call": False}
    found = {name: place(analysis, plan, state.mesh, state.gather, late) for name, late in ways.items()}
    return dataclasses.replace(state, partitioned=found)


def _assign_stages(state: Compilation) -> Compilation:
    assert state.patches is not None and state.mesh is not None
    stages = cut_stages(state.patches, state.analysis.inference, state.plan, state.mesh, state.places)
    return dataclasses.replace(state, stages=stages)


def _tile_rows(state: Compilation) -> Compilation:
    budget = state.budget
    assert budget is not None
    return _changed(state, lambda program: in_strips(program, budget, state.device))


def _hoist_positions(state: Compilation) -> Compilation:
    return _changed(state, lambda program: hoist_positions(program, state.device))


def _hide_exchanges(state: Compilation) -> Compilation:
    return _changed(state, hide_exchanges)


def _changed(state: Compilation, change: Callable[[Program], Program]) -> Compilation:
    """The same with another program in the place of each that this rank runs."""
    if state.stages is None:
        partitioned = {
            name: dataclasses.replace(each, program=change(each.program)) for name, each in state.partitioned.items()
        }
        return dataclasses.replace(state, partitioned=partitioned)
    stages = state.stages
    full, *patches = (
        dataclasses.replace(each, program=change(each.program)) for each in (stages.full, *stages.patches)
    )
    stages = dataclasses.replace(stages, full=full, common=change(stages.common), patches=tuple(patches))
    return dataclasses.replace(state, stages=stages)


def _compile(state: Compilation) -> Compilation:
    assert state.backend is not None
    roots = {name: program.root.to(state.device) for name, program in state.programs.items()}
    return dataclasses.replace(state, runs={name: state.backend.compile(root) for name, root in roots.items()})


@dataclasses.dataclass(frozen=True)
class Pass:
    """A step from a module to what runs: a function of the state, and when there is anything for it to do."""

    name: str
    run: Callable[[Compilation], Compilation]
    wanted: Callable[[Compilation], bool] = lambda state: True


def _fusion(fusion: fusions.OptionalPass) -> Pass:
    return Pass(
        fusion.name,
        lambda state: _changed(state, lambda program: fusion.run(program, fusion.chooser(state.timings))),
        lambda state: fusion.wanted(state.plan.without, state.device),
    )


PASSES = (
    Pass("capture", _capture),
    Pass(
        "hoist_linears",
        _hoist_linears,
        lambda state: state.plan.patch_count == 1 and "hoist_linears" not in state.plan.without,
    ),
    Pass("infer_axes", _infer_axes),
    Pass("choose_units", _choose_units),
    Pass("split_step_invariant", _split_step_invariant, lambda state: state.plan.patch_count > 1),
    Pass("partition", _partition),
    Pass("assign_stages", _assign_stages, lambda state: state.patches is not None),
    Pass("tile_rows", _tile_rows, lambda state: state.budget is not None),
    Pass("hoist_positions", _hoist_positions),
    _fusion(fusions.SPREAD_NORMS),
    _fusion(fusions.LATE_BIASES),
    _fusion(fusions.JOIN_EDGES),
    _fusion(fusions.FOLD_ACTIVATIONS),
    _fusion(fusions.SPLIT_CONCATENATIONS),
    _fusion(fusions.NORM_ROPE),
    _fusion(fusions.PACK_HEADS),
    _fusion(fusions.JOIN_LINEARS),
    _fusion(fusions.JOIN_NORMS),
    Pass("hide_exchanges", _hide_exchanges, lambda state: state.plan.hiding_link is not None),
    Pass("compile", _compile),
)
"""Everything that happens to a call, in this order."""
BEFORE_FUSIONS = PASSES[[each.name for each in PASSES].index(fusions.IN_ORDER[0].name) - 1].name
"""The last pass before those of `passes.fuse` that look at a rank's program."""
BEFORE_DEVICES = PASSES[[each.run for each in PASSES].index(_hoist_positions) - 1].name
"""The last pass before those that ask for which device they are."""
Observer = Callable[[str, Compilation], None]


def run_passes(
    state: Compilation, *, after: str | None = None, until: str | None = None, observers: Sequence[Observer] = ()
) -> Compilation:
    """Run passes, each timed and, where ``XDIT_COMPILE_CHECK`` is set, looked at.

    Args:
        after: name of the last pass that ran before; from the first for None.
        until: name of the pass to stop after; to the last for None.
        observers: told of each pass, and of the state that it left.

    Raises:
        UsageError: no pass has that name.
        BrokenProgramError: a pass left a program that is not well formed.
    """
    first = 0 if after is None else _position(after) + 1
    last = len(PASSES) - 1 if until is None else _position(until)
    for each in PASSES[first : last + 1]:
        if each.wanted(state):
            begin = time.perf_counter()
            state = each.run(state)
            taken = (each.name, time.perf_counter() - begin)
            state = dataclasses.replace(state, seconds=(*state.seconds, taken))
            if os.environ.get(CHECK):
                check(state)
            for observer in observers:
                observer(each.name, state)
    return state


def _position(name: str) -> int:
    names = [each.name for each in PASSES]
    if name not in names:
        raise UsageError(unknown(f"pass {name!r}", name, names))
    return names.index(name)


def check(state: Compilation) -> None:
    """Look at all programs of a state.

    Raises:
        BrokenProgramError: one is not well formed.
    """
    cut = {} if state.stages is None else {"full": state.stages.full, **_numbered(state.stages.patches)}
    for name, program in state.programs.items():
        received = len(cut[name].received) if name in cut else 0
        verify_program(program, name, metadata=name == "captured", received=received)
    if state.inference is not None:
        verify_axes(state.inference)


def analyse(
    module: nn.Module, plan: Plan, args: tuple, kwargs: dict, *, forward: Callable[..., Any] | None = None,
    check: bool = True, choose: Callable[[Inference, Plan], Chosen] = choose_units, run: bool = True,
    observers: Sequence[Observer] = (), watched: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Analysis:  # fmt: skip
    """The passes that are the same on every rank: capture one call of a module, name its axes, choose what to split.

    Raises:
        CaptureError: when no capture agrees with the module.
    """
    call = Call(module, args, kwargs, forward, check, run, watched)
    return run_passes(Compilation(plan, call, choose), until="choose_units", observers=observers).analysis


def compiled(
    analysis: Analysis, plan: Plan, mesh: Mesh, *, until: str | None = None, observers: Sequence[Observer] = (),
    **wanted: Any,
) -> Compilation:  # fmt: skip
    """The passes for one rank of ``mesh``.

    Args:
        wanted: further fields of `Compilation`.

    Raises:
        PartitionError: where something cannot be split and may not be gathered.
    """
    known = {field.name: getattr(analysis, field.name) for field in dataclasses.fields(analysis)}
    state = Compilation(plan, mesh=mesh, **known, **wanted)
    return run_passes(state, after="choose_units", until=until, observers=observers)


def place(analysis: Analysis, plan: Plan, mesh: Mesh, gather: bool = True, stale: bool = False) -> Partitioned:
    """The program of one rank of ``mesh``; without ``gather`` its results are this rank's part.

    With ``stale`` what it needs of other ranks' patches is what they left in the call before.

    Raises:
        PartitionError: where something cannot be split and may not be gathered.
    """
    layout = Layout.of(plan, mesh, analysis.units)
    return partition(analysis.inference, dataclasses.replace(layout, stale=stale), gather)


def place_stage(analysis: Analysis, plan: Plan, mesh: Mesh, places: dict[str, int]) -> StagePrograms:
    """The stage of one rank of ``mesh``, of a call with what stays the same in calls of its own.

    Raises:
        PartitionError: patches that need all others at once, or stages that the blocks do not fill.
    """
    patches = partition_patches(analysis.inference, analysis.units, plan, mesh)
    return cut_stages(patches, analysis.inference, plan, mesh, places)


def separated(analysis: Analysis, plan: Plan) -> Analysis:
    """The same call with what stays the same from patch to patch in calls of its own."""
    for split in cuts(analysis.inference, plan):
        names = varying(analysis.inference, split)
        if names:
            program = separate(analysis.program, names)
            inference = infer(program, rulebook())
            return Analysis(program, inference, choose_units(inference, plan), analysis.seconds)
    return analysis
