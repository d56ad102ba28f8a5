"""What ranks ask of their communicators, and when it is done if each does it in order, as NCCL's streams do.

A rank's program is recorded without any other rank: what it asks for depends on no values. Played together, every rank
has one queue for each communicator, whose first operation starts once its peers have the same one first in theirs and
all that was computed before it was asked for is done.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from xdit_compile.distributed.mesh import Mesh, connect
from xdit_compile.kernels.collectives.process_groups import RUNNING, Groups


class Compute(NamedTuple):
    """The device computes for so long."""

    seconds: float


class Begin(NamedTuple):
    """An operation is asked for: ``what`` it is, in which communicator, and the ranks that it takes."""

    number: int
    queue: str
    what: tuple[Any, ...]
    ranks: tuple[int, ...]


class Wait(NamedTuple):
    """What is computed from here on takes what an operation brings."""

    number: int


Event = Compute | Begin | Wait


class Stuck(AssertionError):
    """Ranks wait for one another."""


def play(programs: Sequence[Sequence[Event]], seconds: float = 0.0, queue: Callable[[str], str] = str) -> float:
    """When the last rank is done.

    Args:
        programs: what every rank does.
        seconds: how long a transfer takes.
        queue: the queue for a communicator's operations.

    Raises:
        Stuck: not all can be done.
    """
    return _Play(programs, seconds, queue).run()


class _Play:
    def __init__(self, programs: Sequence[Sequence[Event]], seconds: float, queue: Callable[[str], str]):
        self.left = [collections.deque(program) for program in programs]
        self.seconds, self.queue = seconds, queue
        self.clock = [0.0] * len(programs)
        self.queues: dict[tuple[int, str], collections.deque[tuple[Begin, float]]] = {}
        self.free: dict[tuple[int, str], float] = collections.defaultdict(float)
        self.done: dict[tuple[int, int], float] = {}

    def run(self) -> float:
        while self._advance() | self._transfer():
            pass
        if any(self.left) or any(self.queues.values()):
            raise Stuck({rank: queue[0][0] for rank, queue in self.queues.items() if queue})
        return max(self.clock)

    def _advance(self) -> bool:
        """Every rank as far as it comes."""
        before = sum(map(len, self.left))
        for rank, events in enumerate(self.left):
            while events and not (isinstance(events[0], Wait) and (rank, events[0].number) not in self.done):
                self._do(rank, events.popleft())
        return sum(map(len, self.left)) < before

    def _do(self, rank: int, event: Event) -> None:
        if isinstance(event, Compute):
            self.clock[rank] += event.seconds
        elif isinstance(event, Wait):
            self.clock[rank] = max(self.clock[rank], self.done[rank, event.number])
        else:
            where = rank, self.queue(event.queue)
            self.queues.setdefault(where, collections.deque()).append((event, self.clock[rank]))

    def _transfer(self) -> bool:
        """Every operation whose ranks all have it first in their queues."""
        moved = False
        for (_, name), queue in self.queues.items():
            while queue and self._together(name, queue[0][0]):
                moved = True
        return moved

    def _together(self, name: str, asked: Begin) -> bool:
        members = [self.queues.get((rank, name)) for rank in asked.ranks]
        if not all(each and each[0][0][1:] == asked[1:] for each in members):
            return False
        heads = [(rank, *each.popleft()) for rank, each in zip(asked.ranks, members, strict=True) if each]
        end = self.seconds + max(max(ready, self.free[rank, name]) for rank, _, ready in heads)
        for rank, each, _ in heads:
            self.free[rank, name] = self.done[rank, each.number] = end
        return True


class Group(NamedTuple):
    """Stands for a process group."""

    number: int
    ranks: tuple[int, ...]
    role: str

    @property
    def queue(self) -> str:
        return str(self.number)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def _get_backend(self, device: torch.device) -> Any:
        return types.SimpleNamespace(name=lambda: "gloo")

    def size(self) -> int:
        return len(self.ranks)


class Recorder:
    """What one rank does: torch.distributed's functions note here what is asked of them, and nothing moves."""

    def __init__(self, rank: int):
        self.rank, self.groups = rank, list[Group]()
        self.events: list[Event] = []
        self._asked = 0

    def asked(self, group: Group, what: tuple[Any, ...], ranks: Sequence[int] | None = None) -> Any:
        """An operation; what it returns notes who waits for it."""
        self._asked += 1
        number = self._asked
        self.events.append(Begin(number, group.queue, what, tuple(group.ranks if ranks is None else ranks)))
        wait = lambda *_: self.events.append(Wait(number))  # noqa: E731
        return types.SimpleNamespace(wait=wait, is_completed=lambda: True)

    def computed(self, seconds: float) -> None:
        self.events.append(Compute(seconds))

    @contextlib.contextmanager
    def installed(self) -> Iterator[Recorder]:
        functions = {
            "new_group": self._new_group,
            "all_reduce": self._collective,
            "broadcast": self._collective,
            "batch_isend_irecv": self._batch,
            "P2POp": lambda *given: given,
            "get_backend": lambda group: "gloo",
            "get_backend_config": lambda group: "cpu:gloo",
        }
        with mock.patch.multiple(dist, **functions):
            yield self

    def _new_group(self, ranks: list[int], timeout: Any, backend: str | None, group_desc: str) -> Group:
        self.groups.append(Group(len(self.groups), tuple(ranks), group_desc))
        return self.groups[-1]

    def _collective(self, tensor: torch.Tensor, *, group: Group, async_op: bool = False, **_: Any) -> Any:
        work = self.asked(group, ("all",))
        if not async_op:
            tensor.mul_(group.size())
        return work if async_op else work.wait()

    def _batch(self, operations: Sequence[tuple[Any, torch.Tensor, int, Group]]) -> list[Any]:
        ((op, tensor, peer, group),) = operations
        source, to = (self.rank, peer) if op is dist.isend else (peer, self.rank)
        assert {source, to} == set(group.ranks) and tensor.dtype in (torch.uint8, torch.float32)
        return [self.asked(group, (source, to, tensor.numel()), (source, to))]


def recorded(mesh: Mesh, run: Callable[[Recorder], None], rows: int = 1) -> Recorder:
    """What a rank does to connect, and then in ``run``, whose operations find their groups."""
    recorder = Recorder(mesh.rank)
    with recorder.installed():
        groups = Groups(functools.partial(connect, mesh, datetime.timedelta(seconds=1), rows))
        groups.open()
        token = RUNNING.set(groups)
        try:
            run(recorder)
        finally:
            RUNNING.reset(token)
    return recorder
