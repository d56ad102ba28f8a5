"""A backend that waits as NCCL's does: at once, whereupon the thread waits for the device, and only an abort frees it.

There is no device. What a group was given it does in the order given, in a thread of its own, which is the device's
queue. A wait blocks until the transfer is done, as if the next operator read it, or with `Pretend.ahead` comes back at
once, and `finish` waits for what was given, as a synchronization of the device does. Nothing else ends either: no
limit, no failure of a peer. After an abort both come back, nothing is raised, and the values are not there.

Transfers go through the store, message by message, so that they can be given up in the middle.
"""

from __future__ import annotations

import datetime
import queue
import threading
import time
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

NAME = "pretend"
PATIENCE_S = 45.0
MADE: weakref.WeakSet[Pretend] = weakref.WeakSet()
Message = Mapping[int, torch.Tensor]


def register() -> None:
    """Make the backend known to `torch.distributed` in this process."""
    dist.Backend.register_backend(NAME, _make, extended_api=True, devices=["cpu"])


def _make(options: Any, _: Any) -> Pretend:
    return Pretend(options.store, options.group_rank, options.group_size, options.timeout, options.group_id)


def finish() -> None:
    """Wait for all that the groups of this process were given."""
    for group in list(MADE):
        group.drain()


class Transfer(distributed_c10d.Work):
    """One transfer in the queue of a group."""

    def __init__(self, run: Callable[[], None], aborted: threading.Event, ahead: bool):
        super().__init__()
        self.run, self._aborted, self._ahead = run, aborted, ahead
        self.done = threading.Event()

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        if not self._ahead:
            self.finish()
        return True

    def finish(self) -> None:
        """Wait until it is done or aborted; what waits for longer than any test should has been forgotten."""
        end = time.monotonic() + PATIENCE_S
        while not (self.done.wait(0.01) or self._aborted.is_set()):
            assert time.monotonic() < end, "nothing freed who waits for the device"


class Pretend(dist.ProcessGroup):
    """A process group of this backend."""

    ahead = False
    """Whether the thread that starts transfers goes on before they are done."""

    def __init__(self, store: Any, rank: int, size: int, limit: datetime.timedelta, name: str):
        super().__init__(rank, size)
        self.store, self._name, self._limit = store.clone(), name, limit.total_seconds()
        self._counts: dict[tuple[int, int, bool], int] = {}
        self._queue: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._last: Transfer | None = None
        self.aborted = threading.Event()
        self.state = "SUCCESS"
        threading.Thread(target=_work, args=(self._queue, self.aborted), daemon=True).start()
        MADE.add(self)

    # ---- what NCCL's groups have beside transfers

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        return self._name

    def _get_backend(self, device: torch.device) -> Pretend:
        return self

    supports_coalescing = False

    def abort(self) -> None:
        self.aborted.set()

    def shutdown(self) -> None:
        self.aborted.set()

    def get_error(self) -> Any:
        return types.SimpleNamespace(name=self.state)

    def drain(self) -> None:
        """Wait until the queue is empty."""
        if self._last is not None:
            self._last.finish()

    # ---- transfers

    def _start(
        self, sent: Message, wanted: Message, put: Callable[[dict[int, torch.Tensor]], None] | None = None
    ) -> Transfer:
        """Send tensors to ranks, and fill those that are wanted of ranks, unless ``put`` does something with them."""
        if self.aborted.is_set():
            raise dist.DistBackendError(f"communicator was aborted on rank {self.rank()}")
        outgoing = {self._key(self.rank(), to): _bytes(tensor) for to, tensor in sent.items() if tensor.numel()}
        keys = {
            source: self._key(source, self.rank(), sent=False) for source, tensor in wanted.items() if tensor.numel()
        }

        def run() -> None:
            for key, value in outgoing.items():
                self.store.set(key, value)
            came = {source: self._received(key) for source, key in keys.items()}
            if not self.aborted.is_set():
                found = {source: _tensor(value, wanted[source]) for source, value in came.items()}
                (put or (lambda found: _fill(wanted, found)))(found)

        self._last = Transfer(run, self.aborted, type(self).ahead)
        self._queue.put(self._last)
        return self._last

    def _key(self, source: int, to: int, sent: bool = True) -> str:
        """Of the next message between two ranks: each side counts its own."""
        count = self._counts[source, to, sent] = self._counts.get((source, to, sent), 0) + 1
        return f"{source}to{to}/{count}"

    def _received(self, key: str) -> bytes:
        begin = time.monotonic()
        while not self.aborted.is_set():
            if self.store.check([key]):
                value = self.store.get(key)
                self.store.delete_key(key)
                return value
            if time.monotonic() - begin > self._limit:
                self.state = "TIMEOUT"
            time.sleep(0.002)
        return b""

    def _all(self, tensor: torch.Tensor) -> Message:
        return dict.fromkeys(range(self.size()), tensor)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Transfer:
        (tensor,) = tensors
        combine = torch.amax if opts is not None and opts.reduceOp == dist.ReduceOp.MAX else torch.sum

        def put(found: dict[int, torch.Tensor]) -> None:
            tensor.copy_(combine(torch.stack([found[rank] for rank in sorted(found)]), 0))

        return self._start(self._all(tensor), self._all(tensor), put)

    def all_to_all_single(
        self, out: torch.Tensor, given: torch.Tensor, out_splits: Any, in_splits: Any, opts: Any = None
    ) -> Transfer:
        even = [len(out) // self.size()] * self.size()
        pieces = dict(enumerate(given.split(list(in_splits) or even)))
        return self._start(pieces, dict(enumerate(out.split(list(out_splits) or even))))

    alltoall_base = all_to_all_single

    def all_gather_single(self, out: torch.Tensor, given: torch.Tensor, opts: Any = None) -> Transfer:
        return self._start(self._all(given), dict(enumerate(out.view(-1).chunk(self.size()))))

    _allgather_base = all_gather_single

    def allgather(self, outs: list[list[torch.Tensor]], given: list[torch.Tensor], opts: Any = None) -> Transfer:
        return self._start(self._all(given[0]), dict(enumerate(outs[0])))

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Transfer:
        (tensor,) = tensors
        others = [rank for rank in range(self.size()) if rank != self.rank()]
        if opts.rootRank == self.rank():
            return self._start(dict.fromkeys(others, tensor), {})
        return self._start({}, {opts.rootRank: tensor})

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Transfer:
        return self._start({to: tensors[0]}, {})

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Transfer:
        return self._start({}, {source: tensors[0]})


def _work(waiting: queue.SimpleQueue[Transfer], aborted: threading.Event) -> None:
    while True:
        try:
            transfer = waiting.get(timeout=1)
        except queue.Empty:
            if aborted.is_set():
                return
            continue
        if not aborted.is_set():
            transfer.run()
        transfer.done.set()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(value: bytes, like: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(value), dtype=torch.uint8).view(like.dtype).view(like.shape)


def _fill(wanted: Message, found: Message) -> None:
    with torch.no_grad():
        for source, tensor in found.items():
            wanted[source].copy_(tensor)
