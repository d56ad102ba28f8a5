"""Ranks on a grid of named dimensions, and the process groups over them."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
import torch.distributed as dist

from .errors import AgreementError, PlanError
from .plan import Plan

SEQUENCE = ("ring", "ulysses")
TEAM = ("pipefusion", "distrifusion", "ring", "ulysses", "tensor")
"""Ranks that compute one call of a denoiser together, whatever the batch."""
REPLICA = ("cfg", *TEAM)
"""Ranks that share the rows of an autoencoder, whatever the batch."""
BRANCHES = ("data", "cfg")
"""Ranks that share a batch."""
PIPELINES = ("cfg", "pipefusion")
"""The stages of all pipelines among the ranks that make the same images, each with a branch of guidance."""
ALONE = ""
OWN_WORDS = ("out of memory", "DefaultCPUAllocator", "Cuda failure", "CUDA error")
"""What libraries say of this rank's memory and device, in errors of any type."""
_SIMULATED = "sim/"

Names = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """One rank's place on a row-major grid of ranks.

    Dimensions are named from outer to inner: on ``Mesh(("ring", "ulysses"), (2, 3), rank=4)`` rank 4 has ring
    coordinate 1 and ulysses coordinate 1. Wherever several dimensions are meant at once they count row-major in the
    mesh's own order, however they are listed.

    Args:
        names: dimensions, outer to inner.
        sizes: ranks along each.
        rank: this rank in the flat order.
        groups: role of the process group for each set of dimensions (in mesh order) that spans several ranks. Graphs
            name these; which group has the role is known when they run.

    Raises:
        PlanError: for sizes below 1, names that repeat, or a rank outside the grid.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    rank: int
    groups: Mapping[tuple[str, ...], str] = dataclasses.field(
        default_factory=lambda: MappingProxyType({}), repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or len(set(self.names)) != len(self.names):
            raise PlanError(f"mesh dimensions {self.names} need distinct names and one size each, not {self.sizes}")
        if any(size < 1 for size in self.sizes):
            raise PlanError(f"mesh sizes {self.sizes} must all be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise PlanError(f"rank {self.rank} is outside a mesh of {self.world_size} ranks")

    @classmethod
    def simulated(cls, plan: Plan, rank: int) -> Mesh:
        """The mesh of a plan with groups that exist in name only; ``simulated_members`` reads their ranks back."""
        mesh = cls._of(plan, rank)
        groups = {
            names: f"{_SIMULATED}{','.join(names)}/{','.join(map(str, mesh.peers(names)))}"
            for names in _subsets(mesh.names)
            if mesh.size(names) > 1
        }
        return dataclasses.replace(mesh, groups=MappingProxyType(groups))

    @classmethod
    def from_process_group(cls, plan: Plan) -> Mesh:
        """The mesh of a plan over the running process group; `connect` makes its groups.

        Without an initialised process group the world is this process alone.

        Raises:
            PlanError: when the degrees do not multiply to the world size.
        """
        ready = dist.is_available() and dist.is_initialized()
        plan.check(dist.get_world_size() if ready else 1)
        mesh = cls._of(plan, dist.get_rank() if ready else 0)
        roles = {names: mesh._role(mesh._wide(names)) for names in _subsets(mesh.names) if mesh.size(names) > 1}
        return dataclasses.replace(mesh, groups=MappingProxyType(roles))

    def shared_rows(self, plan: Plan) -> Mesh:
        """This rank's mesh for the autoencoder: ``plan.rows.ring`` neighbours share rows, and data ranks the batch."""
        members, parts = self.peers(REPLICA), plan.rows.ring
        place = Mesh._of(plan.rows, 0)
        coordinates = {"data": self.coordinate("data"), "ring": members.index(self.rank) % parts}
        rank = place._rank(coordinates.get(name, 0) for name in place.names)
        groups: dict[tuple[str, ...], str] = {("data",): self.group("data")}
        if parts > 1:
            groups["ring",] = self.group(REPLICA) if parts == len(members) else self.rows_role(parts)
        return dataclasses.replace(place, rank=rank, groups=MappingProxyType(groups))

    def rows_role(self, parts: int) -> str:
        """Role of the group of ``parts`` neighbours among the ranks that share rows."""
        return self._role((f"{parts}rows",))

    def _role(self, names: tuple[str, ...]) -> str:
        layout = ".".join(f"{name}{size}" for name, size in zip(self.names, self.sizes, strict=True) if size > 1)
        return f"{layout}/{'.'.join(names)}"

    def _wide(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some dimensions along which there are several ranks."""
        return tuple(name for name in names if self.size(name) > 1)

    @classmethod
    def _of(cls, plan: Plan, rank: int) -> Mesh:
        return cls(plan.mesh_order, tuple(getattr(plan, name) for name in plan.mesh_order), rank)

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return math.prod(self.sizes)

    def coordinate(self, name: str) -> int:
        """This rank's position along one dimension."""
        return self._coordinates()[self._position(name)]

    def size(self, names: Names) -> int:
        """Ranks along one dimension, or over several together."""
        return math.prod(self.sizes[self._position(name)] for name in self._ordered(names))

    def index(self, names: Names) -> int:
        """This rank's position among ``peers(names)``."""
        return self.peers(names).index(self.rank)

    def peers(self, names: Names) -> list[int]:
        """Ranks that differ from this one at most in the given dimensions, itself included, in ascending order."""
        varied = {self._position(name) for name in self._ordered(names)}
        ranges = [
            range(size) if position in varied else (coordinate,)
            for position, (size, coordinate) in enumerate(zip(self.sizes, self._coordinates(), strict=True))
        ]
        return [self._rank(coordinates) for coordinates in itertools.product(*ranges)]

    def group(self, names: Names) -> str:
        """Name of the process group over ``peers(names)``; empty where that is this rank alone.

        Raises:
            PlanError: for dimensions that the mesh lacks, or a mesh made without groups.
        """
        ordered = self._ordered(names)
        if self.size(ordered) == 1:
            return ALONE
        if ordered not in self.groups:
            ordered = next((kept for kept in self.groups if self.peers(kept) == self.peers(ordered)), ordered)
        if ordered not in self.groups:
            raise PlanError(f"this mesh has no group over {ordered}; make it with from_process_group or simulated")
        return self.groups[ordered]

    def _ordered(self, names: Names) -> tuple[str, ...]:
        wanted = {names} if isinstance(names, str) else set(names)
        for name in wanted:
            self._position(name)
        return tuple(name for name in self.names if name in wanted)

    def _position(self, name: str) -> int:
        if name not in self.names:
            raise PlanError(f"the mesh has no dimension {name!r}; it has {', '.join(self.names)}")
        return self.names.index(name)

    def _coordinates(self) -> tuple[int, ...]:
        rest, found = self.rank, []
        for size in reversed(self.sizes):
            rest, coordinate = divmod(rest, size)
            found.append(coordinate)
        return tuple(reversed(found))

    def _rank(self, coordinates: Iterable[int]) -> int:
        rank = 0
        for coordinate, size in zip(coordinates, self.sizes, strict=True):
            rank = rank * size + coordinate
        return rank


def simulated_members(group: str) -> list[int]:
    """Ranks of a group made by ``Mesh.simulated``, in group order.

    Raises:
        PlanError: for the name of any other group.
    """
    if not is_simulated(group):
        raise PlanError(f"{group!r} is no simulated group; only meshes made by Mesh.simulated have them")
    return [int(rank) for rank in group.rsplit("/", 1)[1].split(",")]


def is_simulated(group: str) -> bool:
    """Whether a group exists in name only."""
    return group.startswith(_SIMULATED)


def _subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The sets of dimensions that have a group, each in mesh order."""
    wanted = [*((name,) for name in names), SEQUENCE, PIPELINES, TEAM, REPLICA, BRANCHES, names]
    return list(dict.fromkeys(tuple(name for name in names if name in chosen) for chosen in wanted))


def connect(mesh: Mesh, limit: datetime.timedelta, rows: int = 1) -> dict[str, dist.ProcessGroup]:
    """Make the group of every role of a mesh, in one order on all ranks; each is used once, so all of it connects.

    Every rank must call this at the same point.

    Args:
        limit: how long a collective waits for a peer.
        rows: how many neighbours share the rows of the autoencoder.

    Raises:
        AgreementError: when a rank does not answer in time.
    """
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    own: dict[str, dist.ProcessGroup] = {}
    for role, teams in _teams(mesh, rows).items():
        for ranks in teams:
            if ranks not in made:
                with _answering(ranks, limit):
                    made[ranks] = dist.new_group(list(ranks), timeout=limit, group_desc=role)
            if mesh.rank in ranks:
                own[role] = made[ranks]
    for ranks, group in made.items():
        if mesh.rank in ranks:
            with _answering(ranks, limit):
                _meet(group)
    return own


def _teams(mesh: Mesh, rows: int) -> dict[str, list[tuple[int, ...]]]:
    """For each role the ranks of every group that has it."""
    places = [dataclasses.replace(mesh, rank=rank) for rank in range(mesh.world_size)]
    teams = {role: [tuple(place.peers(names)) for place in places] for names, role in mesh.groups.items()}
    if 1 < rows < mesh.size(REPLICA):
        members = [place.peers(REPLICA) for place in places]
        runs = [tuple(each[at : at + rows]) for each in members for at in range(0, len(each), rows)]
        teams[mesh.rows_role(rows)] = runs
    return {role: list(dict.fromkeys(each)) for role, each in teams.items()}


def _meet(group: dist.ProcessGroup) -> None:
    """Use a group once, so that all members connect together: a first point-to-point call would connect only two."""
    count = torch.ones(1, device=_device_of(group))
    dist.all_reduce(count, group=group)
    _refuse_short(count, group.size())


def _refuse_short(count: torch.Tensor, ranks: int) -> None:
    """Refuse the first sum of ones that ranks make where an abort cut it short, which is how NCCL's limit ends it."""
    if count.item() != ranks:
        raise RuntimeError("the sum over them never came")


@contextmanager
def _answering(ranks: tuple[int, ...], limit: datetime.timedelta) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_own(error):
            raise
        raise AgreementError(
            f"ranks {list(ranks)} did not all answer within {limit.total_seconds():g} s ({first_sentence(error)}); "
            "start every rank with the same plan and look at the first one that failed"
        ) from error


def is_own(error: RuntimeError) -> bool:
    """Whether what stopped a transfer is this rank's own failure, in which no peer has a part: memory, or the device.

    PyTorch has types for these. What gloo raises is a plain ``RuntimeError``; NCCL's and the store's are `DistError`,
    with words of CUDA's in them where NCCL could not allocate or launch.
    """
    of_its_own_type = type(error) is not RuntimeError and not isinstance(error, dist.DistError)
    return of_its_own_type or any(words in str(error) for words in OWN_WORDS)


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an error says, without the place in C++ where it was raised."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[[^]]*\]\s*", "", text).split(". ")[0].rstrip(".")


def _device_of(group: dist.ProcessGroup) -> torch.device:
    if dist.get_backend(group) == "gloo":
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
