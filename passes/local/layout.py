"""Everything the partitioner must know about the mesh: what is split, over which groups, and this rank's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.axes import Axis
from xdit_compile.ir.sharding import Sharding, Split, Unit
from xdit_compile.passes.axes.infer import Frame
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import MEMBERS, PATCH, SEQUENCE, TENSOR

Chosen = Mapping[str, Sequence[Unit]]
"""What is split, by the name of what splits it."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One rank's view of how a program is split.

    ``groups`` and ``parts`` are by the names of `MEMBERS`; ``sequence`` stands for the ring and Ulysses dimensions
    taken as one. Where ``sparing``, memory goes before time: a convolution does not compute while the rows of its
    neighbours are on their way, and statistics are taken piece by piece.

    With ``patches`` the program keeps the keys and values of all tokens from call to call; the split of `PATCH` is then
    among ``sharding`` too where the program computes one patch alone. Where ``patches`` lie on ranks, each rank keeps
    what it needs of the others': as it is now, or where ``stale`` as it was one call ago.
    Ranks of `SEQUENCE` share every patch that is computed on one rank, and where it ``shares_columns`` the columns of
    linears that have few rows. Over a ``link`` of so many bytes per second from each rank, exchanges of heads are
    hidden where that pays; over None, none are.
    """

    mesh: Mesh
    sharding: Sharding
    groups: Mapping[str, str]
    parts: Mapping[str, int]
    provider: str = "auto"
    refuse_gathers: bool = False
    sparing: bool = False
    patches: Split | None = None
    stale: bool = False
    shares_columns: bool = True
    link: float | None = None

    @classmethod
    def of(cls, plan: Plan, mesh: Mesh, units: Chosen) -> Layout:
        """The layout of a plan once the units to split are chosen; those over one rank alone are not split."""
        active = {dim: MEMBERS[dim] for dim in MEMBERS if units.get(dim) and mesh.size(MEMBERS[dim]) > 1}
        parts = {dim: mesh.size(members) for dim, members in active.items()}
        splits = {dim: Split(dim, parts[dim], units[dim]) for dim in active}
        index = {dim: mesh.index(members) for dim, members in active.items()}
        groups = {dim: mesh.group(members) for dim, members in active.items()}
        return cls(
            mesh,
            Sharding(splits, index),
            groups,
            parts,
            plan.attention,
            plan.fallback == "error",
            plan.vae_memory is not None,
            splits.get(PATCH),
            shares_columns="hoist_linears" not in plan.without,
            link=plan.hiding_link,
        )

    @property
    def apart(self) -> bool:
        """Whether patches lie on ranks."""
        return PATCH in self.groups

    @property
    def one_patch(self) -> bool:
        """Whether the program computes one patch, of which others follow."""
        return PATCH in self.sharding.splits and not self.apart

    def keeping(self, patches: Split, patch: int | None) -> Layout:
        """The layout of a program that keeps what patches leave one another.

        Args:
            patches: how tokens are cut into patches.
            patch: the number of the one that the program computes, reading what the others left; None for all.
        """
        splits, index, parts = dict(self.sharding.splits), self.sharding.index, self.parts
        if SEQUENCE in splits:
            splits[SEQUENCE] = Split(SEQUENCE, parts[SEQUENCE], patches.units, within=patches)
        if patch is not None:
            splits, index, parts = {PATCH: patches, **splits}, {PATCH: patch, **index}, {PATCH: patches.parts, **parts}
        return dataclasses.replace(self, sharding=Sharding(splits, index), parts=parts, patches=patches)

    def alone(self) -> Layout:
        """The layout of what is the same for all patches: ranks that share tokens or batch compute all of it each."""
        splits = {name: split for name, split in self.sharding.splits.items() if name == TENSOR}
        return dataclasses.replace(self, sharding=Sharding(splits, self.sharding.index), patches=None)

    def natural(self, axes: Sequence[Axis]) -> dict[str, int]:
        """For each mesh dimension the first dim of a tensor that it can split, if there is one.

        Args:
            axes: of the tensor, by dim.
        """
        split_dims = {}
        for name, split in self.sharding.splits.items():
            dim = next((dim for dim, axis in enumerate(axes) if split.splits(axis)), None)
            if dim is not None:
                split_dims[name] = dim
        return split_dims

    @staticmethod
    def attribute(frame: Frame, name: str) -> torch.Tensor:
        """A tensor that a captured graph holds itself, by its dotted name."""
        owner = frame.graph.owning_module
        for child in name.split("."):
            owner = getattr(owner, child)
        assert isinstance(owner, torch.Tensor)
        return owner
