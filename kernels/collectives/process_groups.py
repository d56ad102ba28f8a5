"""What ops that reach other ranks share: finding the process group, waiting, reporting a failed wait."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from xdit_compile.distributed.mesh import backends, first_sentence, is_own, is_simulated
from xdit_compile.distributed.watchdog import lenient
from xdit_compile.errors import AgreementError, PeerError

from .communicators import Communicators, abort, abort_blocking, communicators_of, logger, state_of

Make = Callable[[], Mapping[str, dist.ProcessGroup]]
Pulse = Callable[[str, float], None]


class Groups:
    """The process groups that a running program reaches, by their role in its mesh.

    A failure ends them (`close`); `open` makes new ones, which carry nothing of what the old ones had under way. Graphs
    name roles alone, so they stay as they are.

    Waits of gloo block until a transfer is there. Where they come back at once, as NCCL's do, the thread waits later,
    for the device: another one then ends what is under way in vain (`give_up`), and what was computed of it is refused.

    Args:
        make: makes all groups, the same on every rank at the same point.
        pulse: called now and then while a rank waits in a collective, with what it is and the seconds so far; raises
            where waiting is in vain.
    """

    def __init__(self, make: Make, pulse: Pulse = lambda what, waited: None):
        self._make = make
        self._made: dict[str, dist.ProcessGroup] = {}
        self._aborted: list[dist.ProcessGroup] = []
        self._left: list[dist.ProcessGroup] = []
        self._under_way: dict[int, tuple[torch.Tensor, dist.Work, dist.ProcessGroup]] = {}
        self._at_once: dict[int, Communicators] = {}
        self._given_up: AgreementError | None = None
        self._open = False
        self._lock = threading.Lock()
        self.pulse = pulse
        self.come_at_once = False
        """Whether waits for some of the latest groups come back at once."""

    @property
    def is_open(self) -> bool:
        """Whether there are groups that were not given up."""
        return self._open and self._given_up is None

    @property
    def given_up(self) -> AgreementError | None:
        """Why another thread ended what was under way, if one did."""
        return self._given_up

    def open(self) -> None:
        """Make the groups, where there are none.

        Raises:
            AgreementError: when a rank does not answer in time.
        """
        if not self._open:
            with lenient():
                made = dict(self._make())
            self._at_once = {id(group): communicators_of(group) for group in made.values()}
            self._made, self._open, self.come_at_once = made, True, any(self._at_once.values())

    def find(self, role: str) -> dist.ProcessGroup | None:
        """The group of a role; None where this mesh has no such role."""
        if role in self._made:
            return self._made[role]
        if not self.is_open:
            self.refuse()
            raise AgreementError("the connections between ranks were closed after a failure; make another request")
        return None

    def hold(self, tensor: torch.Tensor, work: dist.Work, group: dist.ProcessGroup) -> None:
        """Keep a collective that is under way until `settle` waits for the tensor that it fills."""
        self._under_way[_storage(tensor)] = (tensor, work, group)

    def settle(self, tensor: torch.Tensor, what: str) -> None:
        """Wait for the collective that fills a tensor, if one is under way.

        Raises:
            AgreementError: when a peer died, failed, goes another way or did not answer within the group's limit.
        """
        if _storage(tensor) in self._under_way:
            _, work, group = self._under_way.pop(_storage(tensor))
            self.wait(work, group, what, tensor.device)

    def wait(self, work: dist.Work, group: dist.ProcessGroup, what: str, device: torch.device) -> None:
        """Wait for a collective over what lies on a device, and look now and then whether that is in vain."""
        begin = time.monotonic()
        at_once = device.type in self._at_once.get(id(group), {})
        with answering(group, what):
            while not _came(work, at_once):
                try:
                    self.pulse(what, time.monotonic() - begin)
                except AgreementError:
                    self.leave(group)
                    raise

    def leave(self, group: dist.ProcessGroup) -> None:
        """Give up a collective that is under way in ``group``: the group cannot be ended before the collective is."""
        self._left.append(group)

    def give_up(self, error: AgreementError) -> None:
        """End what is under way where waits come back at once; for another thread than the one that waits.

        That one goes on then, and meets ``error`` at its next transfer, or in `refuse`.
        """
        with self._lock:
            if self.is_open:
                self._given_up = error
                self._aborted, self._made = list({id(group): group for group in self._made.values()}.values()), {}
                self._abort(self._aborted)

    def refuse(self) -> None:
        """Refuse what was computed of transfers that never came.

        Raises:
            AgreementError: the groups were given up, or one of them says itself that it failed.
        """
        found = self._given_up or self.failure()
        if found is not None:
            raise type(found)(str(found))

    def failure(self) -> PeerError | None:
        """What a group whose waits come back at once says of itself: a transfer failed, or took too long."""
        for group in list(self._made.values()):
            state = state_of(self._at_once.get(id(group), {}))
            if state is not None:
                return peer_error(group, "a transfer", state)
        return None

    def close(self, broken: bool = True) -> None:
        """End all groups, which frees peers that wait in one of them.

        Args:
            broken: something may be under way; without it groups whose waits come back at once end in their own time.
        """
        with self._lock:
            aborted = {id(group): group for group in self._aborted}
            made = aborted | {id(group): group for group in self._made.values()}
            self._aborted, self._made, self._open = [], {}, False
            for tensor, work, group in self._under_way.values():
                if tensor.device.type not in self._at_once[id(group)] and not work.is_completed():
                    self.leave(group)
            self._under_way.clear()
            if broken:
                self._abort([group for key, group in made.items() if key not in aborted])
            self._end(made)
            self._given_up, self._at_once = None, {}

    def _abort(self, groups: Sequence[dist.ProcessGroup]) -> None:
        groups = [group for group in groups if self._at_once[id(group)]]
        ended = abort([self._at_once[id(group)] for group in groups])
        self._left += [group for group, in_time in zip(groups, ended, strict=True) if not in_time]

    def _end(self, made: dict[int, dist.ProcessGroup]) -> None:
        left = {id(group) for group in self._left}
        while made:
            key, group = made.popitem()
            if key not in left and group in distributed_c10d._world.pg_map:
                self._destroy(group)
            del group

    def _destroy(self, group: dist.ProcessGroup) -> None:
        if not self._at_once[id(group)]:
            group.abort()
            dist.destroy_process_group(group)
            return
        try:
            abort_blocking(group)
            dist.destroy_process_group(group)
        except RuntimeError as error:
            logger.warning("a process group did not end well (%s)", first_sentence(error))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Ops that run inside find their groups here."""
        token = RUNNING.set(self)
        try:
            yield
        finally:
            RUNNING.reset(token)


RUNNING: ContextVar[Groups | None] = ContextVar("xdit_compile_groups", default=None)
"""The groups of the program that runs in this thread."""


def process_group(role: str) -> dist.ProcessGroup:
    """The process group of a role in the running program, or else the one of that name.

    Raises:
        AgreementError: when no such group exists in this process, or it is a simulated one.
    """
    if is_simulated(role):
        raise AgreementError(f"group {role!r} is simulated and cannot carry data; run its ops through simulate")
    running = RUNNING.get()
    found = None if running is None else running.find(role)
    if found is not None:
        return found
    try:
        return distributed_c10d._resolve_process_group(role)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise AgreementError(
            f"there is no process group {role!r} here ({first_sentence(error)}); make the mesh in this process first"
        ) from error


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


SLICE = datetime.timedelta(seconds=1)


def complete(group: dist.ProcessGroup, what: str, start: Callable[[], dist.Work | None], device: torch.device) -> None:
    """Start a collective with ``async_op=True`` and wait for it, looking now and then whether that is in vain.

    Args:
        device: where what is sent lies.

    Raises:
        AgreementError: when a peer died, failed, goes another way or did not answer within the group's limit.
    """
    running = RUNNING.get()
    with answering(group, what):
        work = start()
        if work is not None and running is None:
            work.wait()
    if work is not None and running is not None:
        running.wait(work, group, what, device)


def hold(tensor: torch.Tensor, work: dist.Work | None, group: dist.ProcessGroup) -> None:
    """Go on while a collective fills a tensor, which `settle` waits for; outside of a running program wait here."""
    running = RUNNING.get()
    if work is not None and running is not None:
        running.hold(tensor, work, group)
    elif work is not None:
        work.wait()


def settle(tensor: torch.Tensor, what: str) -> None:
    """Wait for what fills a tensor, if anything is under way."""
    running = RUNNING.get()
    if running is not None:
        running.settle(tensor, what)


def carrier(device: torch.device, group: dist.ProcessGroup) -> torch.device:
    """Where what lies on a device has to be for a group to send it: gloo does so from host memory, others do not."""
    served = backends(group)
    if served.get(device.type, "gloo") != "gloo":
        return device
    return torch.device("cpu" if "cpu" in served else next(iter(served)))


def _came(work: dist.Work, at_once: bool) -> bool:
    """Wait for a part of the limit; gloo's collectives may be waited for again, unlike its receives.

    Where waits come back at once a limit would have the host wait for the device, and end the communicator. What ends
    between the end of a slice and the look at it has not failed: the second wait tells.
    """
    if at_once:
        work.wait()
        return True
    try:
        work.wait(SLICE)
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()
    return True


@contextmanager
def answering(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Turn the failure of a transfer into one line that names the ranks concerned.

    Where this rank's memory ran out, or its device failed, that is raised as it is.

    Raises:
        PeerError: when a peer died or did not answer within the group's limit.
    """
    try:
        yield
    except RuntimeError as error:
        if is_own(error):
            raise
        raise peer_error(group, what, first_sentence(error)) from error


def peer_error(group: dist.ProcessGroup, what: str, why: str) -> PeerError:
    """What to raise where a transfer broke."""
    return PeerError(
        f"{what} over ranks {dist.get_process_group_ranks(group)} failed on rank {dist.get_rank()} "
        f"({why}); a peer stopped or did not answer in time, look at the first rank that failed"
    )


def check_count(members: dist.ProcessGroup, count: int) -> None:
    """Refuse sizes or splits for another number of ranks than a group has.

    Raises:
        ValueError: with both numbers.
    """
    if dist.get_world_size(members) != count:
        raise ValueError(f"{count} sizes for a group of {dist.get_world_size(members)} ranks")


def check_place(members: dist.ProcessGroup, index: int, op: str) -> None:
    """Refuse a position in a group that is not this rank's.

    Raises:
        ValueError: naming the op.
    """
    if dist.get_rank(members) != index:
        raise ValueError(f"{op} at position {index} of a group where this rank has another; pass its own")
