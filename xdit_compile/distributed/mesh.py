"""Ranks on a grid of named dimensions, and the process groups over them."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist

from xdit_compile.errors import AgreementError, PlanError
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import MEMBERS, TEAM

REPLICA = ("cfg", *TEAM)
"""Ranks that share the rows of an autoencoder, whatever the batch."""
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
        groups: role of the process group for each set of dimensions (in mesh order) that spans several ranks and meets.
            Graphs name these; which group has the role is known when they run.
        edges: role of the process group for each pair of ranks of which the first sends tensors to the second. No other
            transfer is in its queue, not even one the other way.
        behind: role of a second process group of the ``distrifusion`` ranks, for exchanges that nobody waits for within
            a step.

    Raises:
        PlanError: for sizes below 1, names that repeat, or a rank outside the grid.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    rank: int
    groups: Mapping[tuple[str, ...], str] = dataclasses.field(
        default_factory=lambda: MappingProxyType({}), repr=False, compare=False
    )
    edges: Mapping[tuple[int, int], str] = dataclasses.field(
        default_factory=lambda: MappingProxyType({}), repr=False, compare=False
    )
    behind: str = dataclasses.field(default=ALONE, repr=False, compare=False)

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

        def name(names: Iterable[str], ranks: Iterable[int]) -> str:
            return f"{_SIMULATED}{','.join(names)}/{','.join(map(str, ranks))}"

        return cls._of(plan, rank)._with(plan, name)

    @classmethod
    def named(cls, plan: Plan, rank: int) -> Mesh:
        """The mesh of a plan with the roles of its groups; `connect` makes them."""
        mesh = cls._of(plan, rank)
        return mesh._with(plan, lambda names, ranks: mesh._role(names))

    @classmethod
    def from_process_group(cls, plan: Plan) -> Mesh:
        """The mesh of a plan over the running process group; `connect` makes its groups.

        Without an initialised process group the world is this process alone.

        Raises:
            PlanError: when the degrees do not multiply to the world size.
        """
        ready = dist.is_available() and dist.is_initialized()
        plan.check(dist.get_world_size() if ready else 1)
        return cls.named(plan, dist.get_rank() if ready else 0)

    def _with(self, plan: Plan, name: Callable[[tuple[str, ...], Sequence[int]], str]) -> Mesh:
        """This mesh with every group that something of the plan reaches, each called by ``name``."""
        sets = {self._wide(names): self.peers(names) for names in _sets(plan) if self.size(names) > 1}
        behind = ("distrifusion",) if plan.distrifusion > 1 else ()
        return dataclasses.replace(
            self,
            groups=MappingProxyType({names: name(names, peers) for names, peers in sets.items()}),
            edges=MappingProxyType({edge: name((f"{edge[0]}>{edge[1]}",), edge) for edge in _edges(self, plan)}),
            behind=name((*behind, "behind"), self.peers(behind)) if behind else ALONE,
        )

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
        return cls(plan.dimensions, tuple(getattr(plan, name) for name in plan.dimensions), rank)

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
        wide = self._wide(self._ordered(names))
        if not wide:
            return ALONE
        if wide not in self.groups:
            raise PlanError(f"this mesh has no group over {wide}; make it with from_process_group or simulated")
        return self.groups[wide]

    def edge(self, source: int, to: int) -> str:
        """Name of the process group over which one rank sends to another.

        Raises:
            PlanError: for ranks of which the plan has no such pair.
        """
        if (source, to) not in self.edges:
            raise PlanError(f"nothing of this plan goes from rank {source} to rank {to}")
        return self.edges[source, to]

    def rank_at(self, **moved: int) -> int:
        """The rank that has other coordinates than this one along the given dimensions, and the same along all else."""
        here = dict(zip(self.names, self._coordinates(), strict=True))
        return self._rank({**here, **moved}.values())

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
        rest, coordinates = self.rank, []
        for size in reversed(self.sizes):
            rest, coordinate = divmod(rest, size)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))

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


def _sets(plan: Plan) -> list[tuple[str, ...]]:
    """The sets of dimensions along which ranks meet, each in mesh order: those that something of the plan asks for."""
    wanted: list[tuple[str, ...]] = [(name,) for name in plan.dimensions if name != "cfg" or plan.patch_count == 1]
    wanted += [*MEMBERS.values(), plan.dimensions]
    if plan.pipefusion > 1:
        wanted.append(TEAM)
    if plan.rows.ring == plan.replica:
        wanted.append(REPLICA)
    return [tuple(name for name in plan.dimensions if name in chosen) for chosen in wanted]


def _edges(mesh: Mesh, plan: Plan) -> Iterator[tuple[int, int]]:
    """Who sends patches to whom: each stage to the next, the last to the first, and to both ends of other pipelines."""
    if plan.patch_count == 1:
        return
    last = mesh.size("pipefusion") - 1
    for place in _places(mesh):
        stage, branch = place.coordinate("pipefusion"), place.coordinate("cfg")
        if last:
            yield place.rank, place.rank_at(pipefusion=(stage + 1) % (last + 1))
        for other in range(mesh.size("cfg")) if stage == last else ():
            for end in sorted({0, last}) if other != branch else ():
                yield place.rank, place.rank_at(cfg=other, pipefusion=end)


def _places(mesh: Mesh) -> list[Mesh]:
    """The same mesh as every rank has it."""
    return [dataclasses.replace(mesh, rank=rank) for rank in range(mesh.world_size)]


def connect(mesh: Mesh, limit: datetime.timedelta, rows: int = 1) -> dict[str, dist.ProcessGroup]:
    """Make the group of every role of a mesh, in one order on all ranks; each is used once, so all of it connects.

    Every rank must call this at the same point.

    Args:
        limit: how long a collective waits for a peer.
        rows: how many neighbours share the rows of the autoencoder.

    Raises:
        AgreementError: when a rank does not answer in time.
    """
    backend = _carrying()
    made: dict[Channel, dist.ProcessGroup] = {}
    reached: dict[str, dist.ProcessGroup] = {}
    for role, channel in channels(mesh, rows):
        if channel not in made:
            ranks = list(channel.ranks)
            with _answering(channel.ranks, limit):
                made[channel] = dist.new_group(ranks, timeout=limit, backend=backend, group_desc=role)
        if mesh.rank in channel.ranks:
            reached[role] = made[channel]
    for channel, group in made.items():
        if mesh.rank in channel.ranks:
            with _answering(channel.ranks, limit):
                _meet(channel, mesh.rank, group)
    return reached


class Channel(NamedTuple):
    """A process group that a mesh needs: its ranks, and what it is apart from others of the same ranks.

    Roles that have the same ranks share one, unless what goes through must not stand in one queue with anything else:
    then ``lane`` is that role. From the first rank of an ``edge`` tensors are sent to the second.
    """

    ranks: tuple[int, ...]
    lane: str = ""
    edge: bool = False


def channels(mesh: Mesh, rows: int = 1) -> list[tuple[str, Channel]]:
    """Every role of a mesh with every process group that has it, in the order in which all ranks make them."""
    places = _places(mesh)
    roles = [(role, Channel(tuple(place.peers(names)))) for names, role in mesh.groups.items() for place in places]
    if 1 < rows < mesh.size(REPLICA):
        members = [place.peers(REPLICA) for place in places]
        runs = [tuple(each[at : at + rows]) for each in members for at in range(0, len(each), rows)]
        roles += [(mesh.rows_role(rows), Channel(run)) for run in runs]
    if mesh.behind:
        roles += [(mesh.behind, Channel(tuple(place.peers("distrifusion")), mesh.behind)) for place in places]
    roles += [(role, Channel(edge, role, edge=True)) for edge, role in mesh.edges.items()]
    return list(dict.fromkeys(roles))


def _meet(channel: Channel, rank: int, group: dist.ProcessGroup) -> None:
    """Use a group once from everywhere, so that all members connect together, and in the way in which it will be used.

    NCCL connects ranks for transfers between two when the first of them begins, and holds up whoever begins it.
    """
    for device in _devices_of(group):
        count = torch.ones(1, device=device)
        dist.all_reduce(count, group=group)
        if channel.edge:
            source, to = channel.ranks
            for work in send(count, to, group) if rank == source else receive(count, source, group):
                work.wait()
        _refuse_short(count, group.size())


def _refuse_short(count: torch.Tensor, ranks: int) -> None:
    """Refuse the first sum of ones that ranks make where an abort cut it short, which is how NCCL's limit ends it."""
    if count.item() != ranks:
        raise RuntimeError("the sum over them never came")


def send(tensor: torch.Tensor, to: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """Begin to send a tensor to a rank.

    As a batch of one: by itself NCCL would send it through a communicator of the two ranks that it makes for that,
    in place of the group's, which has met.
    """
    return dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, to, group)])


def receive(tensor: torch.Tensor, source: int, group: dist.ProcessGroup) -> list[dist.Work]:
    """Begin to fill a tensor with what a rank sends; see `send`."""
    return dist.batch_isend_irecv([dist.P2POp(dist.irecv, tensor, source, group)])


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


def backends(group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """The backend of a process group, or of the default one, for every kind of device that it serves."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def _carrying() -> str | None:
    """The backend of new groups where the default one's sends nothing from the CPU: with gloo beside it."""
    if not (dist.is_initialized() and dist.is_gloo_available()) or "cpu" in backends():
        return None
    return f"cpu:gloo,{dist.get_backend_config()}"


def _devices_of(group: dist.ProcessGroup) -> list[torch.device]:
    """From where a group sends. Gloo does so from the CPU, also what lies on an accelerator."""
    served, kind = backends(group), torch.accelerator.current_accelerator()
    devices = [torch.device("cpu")] if "cpu" in served else []
    if kind is not None and served.get(kind.type, "gloo") != "gloo":
        devices.append(torch.device(kind.type, torch.accelerator.current_device_index()))
    return devices
