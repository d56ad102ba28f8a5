"""What one rank runs of a denoiser whose tokens are cut into patches and whose blocks are cut into stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from xdit_compile.distributed.mesh import Mesh
from xdit_compile.errors import PlanError
from xdit_compile.ir.axes import Axis
from xdit_compile.ir.patch_layout import PatchLayout
from xdit_compile.ir.program import Input, Kind, Program
from xdit_compile.ir.sharding import Split
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.passes.local.layout import Chosen, Layout
from xdit_compile.passes.partition.program import Partitioned, partition
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import SEQUENCE

from .assign_stages import Stage, assign, cut, everywhere, only
from .choose_patches import cannot_cut, choose_patches, one_patch, varying


@dataclasses.dataclass(frozen=True)
class PatchPrograms:
    """The programs of all tokens and of each patch, of all stages together.

    Args:
        full: computes all tokens at once.
        patches: the program of each patch.
        varying: names of the inputs that change from step to step as the result does.
        inputs: how the patches lie in each input that is cut, by its position among the flat inputs.
        results: the same for each result.
        wholes: tensors of the shapes and dtypes of the results, on the meta device.
    """

    full: Partitioned
    patches: tuple[Program, ...]
    varying: tuple[str, ...]
    inputs: Mapping[int, PatchLayout]
    results: tuple[PatchLayout, ...]
    wholes: tuple[torch.Tensor, ...]


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
        results: the same for each result.
        wholes: tensors of the shapes and dtypes of the results, on the meta device.
    """

    stage: int
    full: Stage
    common: Program
    shared: tuple[str, ...]
    patches: tuple[Stage, ...]
    varying: tuple[int, ...]
    inputs: Mapping[int, PatchLayout]
    results: tuple[PatchLayout, ...]
    wholes: tuple[torch.Tensor, ...]

    @property
    def programs(self) -> list[Program]:
        """All that the rank runs."""
        return [self.full.program, self.common, *(patch.program for patch in self.patches)]

    def likes(self, patch: int) -> list[torch.Tensor]:
        """Tensors of the shapes and dtypes of the results of one patch, on the meta device."""
        return [layout.like(whole, patch) for layout, whole in zip(self.results, self.wholes, strict=True)]

    def taken(self, kind: Kind) -> dict[str | int, tuple[Input, torch.Tensor]]:
        """The inputs of one kind that programs take, by target, each with a tensor of its whole shape."""
        return {
            spec.target: (spec, node.meta["val"])
            for program in self.programs
            for spec, node in zip(program.inputs, program.root.graph.find_nodes(op="placeholder"), strict=False)
            if spec.kind == kind
        }


def partition_patches(inference: Inference, units: Chosen, plan: Plan, mesh: Mesh) -> PatchPrograms:
    """The programs of all tokens and of each patch, for one rank of ``mesh``.

    Raises:
        PlanError: patches that need all others at once.
    """
    split = choose_patches(inference, plan)
    names = varying(inference, split)
    layout = Layout.of(plan, mesh, {**units, SEQUENCE: split.units})
    full = partition(inference, layout.keeping(split, None), shared=everywhere(inference, names))
    patches = tuple(one_patch(inference, layout, split, patch).program for patch in range(split.parts))
    users = _users(inference)
    placeholders = inference.program.root.graph.find_nodes(op="placeholder")
    inputs = {users[node.name]: _laid(inference.axes[node][0], split) for node in placeholders if node.name in users}
    (output,) = inference.program.root.graph.find_nodes(op="output")
    results = [_laid(inference.axes[leaf][0], split) for leaf in output.args[0]]
    wholes = tuple(torch.empty_like(leaf.meta["val"], device="meta") for leaf in output.args[0])
    for index, patch in enumerate(patches):
        (local,) = patch.root.graph.find_nodes(op="output")
        for leaf, laid, whole in zip(local.args[0], results, wholes, strict=True):
            if laid is None or leaf.meta["val"].shape != laid.like(whole, index).shape:
                reason = "a result is not cut as the input is"
                raise PlanError(cannot_cut(plan, reason))
    return PatchPrograms(
        full,
        patches,
        tuple(names),
        {position: laid for position, laid in inputs.items() if laid is not None},
        tuple(laid for laid in results if laid is not None),
        wholes,
    )


def cut_stages(
    programs: PatchPrograms, inference: Inference, plan: Plan, mesh: Mesh, places: dict[str, int]
) -> StagePrograms:
    """One rank's stage of the programs of all tokens and of each patch.

    Args:
        places: the stages of blocks, by their paths, of programs of the same module that were placed before; those of
            this one are added.

    Raises:
        PlanError: stages that the blocks do not fill.
    """
    names, count, full = programs.varying, plan.pipefusion, programs.full
    stages, stage = assign(inference, names, count, plan.stage_layers, places), mesh.coordinate("pipefusion")
    mine = tuple(cut(each, stages, names, count)[stage] for each in programs.patches)
    wanted = dict.fromkeys(str(each.target) for one in mine for each in one.program.inputs if each.kind == "shared")
    users = _users(inference)
    return StagePrograms(
        stage,
        cut(full.program, stages, names, count)[stage],
        only(full.program, [full.wholes[name] for name in wanted]),
        tuple(wanted),
        mine,
        tuple(users[name] for name in names),
        programs.inputs,
        programs.results,
        programs.wholes,
    )


def _users(inference: Inference) -> dict[str, int]:
    """Positions of the user's inputs among the flat ones, by name."""
    return {given.name: int(given.target) for given in inference.program.inputs if given.kind == "user"}


def _laid(axes: Sequence[Axis], split: Split) -> PatchLayout | None:
    """How patches lie in a tensor of these axes; None where it is not cut."""
    dim = next((dim for dim, axis in enumerate(axes) if split.splits(axis)), None)
    if dim is None:
        return None
    held = tuple(tuple(map(int, split.positions(axes[dim], patch))) for patch in range(split.parts))
    return PatchLayout(len(axes) - dim, held)
