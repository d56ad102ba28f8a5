"""From a module and one call of it to what this rank runs: capture, infer, choose, partition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from xdit_compile.capture.capture import capture
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.axes import Axis
from xdit_compile.ir.program import Input, Kind, Program
from xdit_compile.ir.sharding import Split
from xdit_compile.passes.axes.infer import Inference, infer
from xdit_compile.passes.choose.batch import choose_batch
from xdit_compile.passes.choose.features import choose_features
from xdit_compile.passes.choose.tokens import choose_tokens
from xdit_compile.passes.local.layout import PATCH, SEQUENCE, TENSOR, Chosen, Layout
from xdit_compile.passes.partition.program import Partitioned, partition
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.passes.stages.assign_stages import Stage, assign, cut, everywhere, only
from xdit_compile.passes.stages.choose_patches import choose_patches, cuts, one_patch, varying
from xdit_compile.passes.stages.split_step_invariant import separate

from .errors import PartitionError
from .plan import Plan


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
    """What each kind of parallelism in the plan splits; a batch of one is not split, its calls are shared instead.

    Of a plan with patches ranks share the tokens of each patch: what that splits follows from the patches.
    """
    return {
        **choose_batch(inference, plan.data, plan.cfg),
        PATCH: choose_tokens(inference, plan, PATCH),
        SEQUENCE: choose_tokens(inference, plan) if plan.patch_count == 1 else (),
        TENSOR: choose_features(inference, plan),
    }


def choose_within_batch(inference: Inference, plan: Plan) -> Chosen:
    """The same for a call that is one rank's part of a batch."""
    return choose_units(inference, dataclasses.replace(plan, data=1, cfg=1))


def place(analysis: Analysis, plan: Plan, mesh: Mesh, gather: bool = True, stale: bool = False) -> Partitioned:
    """The program of one rank of ``mesh``; without ``gather`` its results are this rank's part.

    With ``stale`` what it needs of other ranks' patches is what they left in the call before.

    Raises:
        PartitionError: where something cannot be split and may not be gathered.
    """
    layout = Layout.of(plan, mesh, analysis.units)
    return partition(analysis.inference, dataclasses.replace(layout, stale=stale), gather)


@dataclasses.dataclass(frozen=True)
class Lie:
    """How patches lie in a tensor: the positions of each along the dim that is ``back`` from the end."""

    back: int
    positions: tuple[tuple[int, ...], ...]
    likes: tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class StagePrograms:
    """What one rank runs of a denoiser that is cut into stages and patches.

    Args:
        stage: this rank's stage.
        full: its part of the program that computes all tokens at once.
        common: computes what its patches need alike: the values named in ``shared``.
        patches: its part of the program of each patch.
        varying: positions among the flat inputs of those that change from step to step as the result does.
        inputs: how the patches lie in each input that is cut, by its position among the flat inputs.
        results: the same for each result, with the shapes of its patches.
    """

    stage: int
    full: Stage
    common: Program
    shared: tuple[str, ...]
    patches: tuple[Stage, ...]
    varying: tuple[int, ...]
    inputs: Mapping[int, Lie]
    results: tuple[Lie, ...]

    @property
    def programs(self) -> list[Program]:
        """All that the rank runs."""
        return [self.full.program, self.common, *(patch.program for patch in self.patches)]

    def taken(self, kind: Kind) -> dict[str | int, tuple[Input, torch.Tensor]]:
        """The inputs of one kind that programs take, by target, each with a tensor of its whole shape."""
        return {
            given.target: (given, node.meta["val"])
            for program in self.programs
            for given, node in zip(program.inputs, program.root.graph.find_nodes(op="placeholder"), strict=False)
            if given.kind == kind
        }


def separated(analysis: Analysis, plan: Plan) -> Analysis:
    """The same call with what stays the same from patch to patch in calls of its own."""
    for split in cuts(analysis.inference, plan):
        names = varying(analysis.inference, split)
        if names:
            program = separate(analysis.program, names)
            inference = infer(program, rulebook())
            return Analysis(program, inference, choose_units(inference, plan))
    return analysis


def place_stage(analysis: Analysis, plan: Plan, mesh: Mesh, places: dict[str, int]) -> StagePrograms:
    """The stage of one rank of ``mesh``.

    Args:
        places: the stages of blocks, by their paths, of programs of the same module that were placed before; those of
            this one are added.

    Raises:
        PartitionError: patches that need all others at once, or stages that the blocks do not fill.
    """
    inference, count = analysis.inference, plan.pipefusion
    split = choose_patches(inference, plan)
    names = varying(inference, split)
    stages = assign(inference, names, count, plan.stage_layers, places)
    layout = Layout.of(plan, mesh, {**analysis.units, SEQUENCE: split.units})
    stage = mesh.coordinate("pipefusion")
    full = partition(inference, layout.keeping(split, None), shared=everywhere(inference, names))
    patches = [one_patch(inference, layout, split, at).program for at in range(split.parts)]
    users = {given.name: int(given.target) for given in analysis.program.inputs if given.kind == "user"}
    placeholders = analysis.program.root.graph.find_nodes(op="placeholder")
    given = {
        users[node.name]: _lie(inference.axes[node][0], node, split) for node in placeholders if node.name in users
    }
    (output,) = analysis.program.root.graph.find_nodes(op="output")
    results = [_lie(inference.axes[leaf][0], leaf, split) for leaf in output.args[0]]
    for at, patch in enumerate(patches):
        (output,) = patch.root.graph.find_nodes(op="output")
        for leaf, lie in zip(output.args[0], results, strict=True):
            if lie is None or leaf.meta["val"].shape != lie.likes[at].shape:
                reason = "a result is not cut as the input is"
                raise PartitionError(f"pipefusion cannot cut this denoiser into {split.parts} patches: {reason}")
    own = tuple(cut(each, stages, names, count)[stage] for each in patches)
    wanted = dict.fromkeys(str(each.target) for one in own for each in one.program.inputs if each.kind == "shared")
    return StagePrograms(
        stage,
        cut(full.program, stages, names, count)[stage],
        only(full.program, [full.wholes[name] for name in wanted]),
        tuple(wanted),
        own,
        tuple(users[name] for name in names),
        {at: lie for at, lie in given.items() if lie is not None},
        tuple(lie for lie in results if lie is not None),
    )


def _lie(axes: Sequence[Axis], node: fx.Node, split: Split) -> Lie | None:
    dim = next((dim for dim, axis in enumerate(axes) if split.splits(axis)), None)
    if dim is None:
        return None
    held = tuple(tuple(map(int, split.positions(axes[dim], at))) for at in range(split.parts))
    sizes, dtype = [axis.size for axis in axes], node.meta["val"].dtype
    likes = [torch.empty([*sizes[:dim], len(each), *sizes[dim + 1 :]], dtype=dtype, device="meta") for each in held]
    return Lie(len(axes) - dim, held, tuple(likes))
