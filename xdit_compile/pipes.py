"""Point-to-point transfers between the stages of a pipeline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from .kernels.groups import answering, carrier, complete, process_group


@dataclasses.dataclass
class Arriving:
    """Tensors on their way to this rank, or from it."""

    tensors: tuple[torch.Tensor, ...]
    _works: list[dist.Work]
    _pipe: Pipe
    _device: torch.device

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors, once they are here.

        Raises:
            AgreementError: when the sender fails or does not answer in time.
        """
        if self._works:
            with answering(self._pipe.members, "a transfer between stages"):
                for work in self._works:
                    work.wait()
            self._works.clear()
        self.tensors = tuple(each.to(self._device) for each in self.tensors)
        return self.tensors


class Pipe:
    """One rank's ends of a pipeline: every message meets the receiver's request of the same order.

    What is on its way is kept until the second call after, when it has arrived or will at once: no rank is further than
    one call ahead of another.

    Args:
        group: role of the process group of the stages, in order.
    """

    def __init__(self, group: str):
        self._group = group
        self._before: list[Arriving] = []
        self._under_way: list[Arriving] = []

    @property
    def members(self) -> dist.ProcessGroup:
        """The stages, in order."""
        return process_group(self._group)

    def reset(self) -> None:
        """Forget what is on its way: connections were closed."""
        self._before, self._under_way = [], []

    @property
    def kept(self) -> int:
        """How many transfers are kept."""
        return len(self._before) + len(self._under_way)

    def turn(self) -> None:
        """Another call begins: let go of what was sent and asked for two calls ago.

        Raises:
            AgreementError: when another stage fails or does not answer in time.
        """
        for each in self._before:
            each.wait()
        self._before, self._under_way = self._under_way, []

    def send(self, tensors: Sequence[torch.Tensor], to: int) -> None:
        """Send tensors to a stage, and go on at once. Empty ones are not sent."""
        kept = tuple(each.contiguous().to(carrier(each.device, self.members)) for each in tensors if each.numel())
        with answering(self.members, "a transfer between stages"):
            works = [dist.isend(each, group=self.members, group_dst=to) for each in kept]
        self._keep(kept, works, kept[0].device if kept else torch.device("cpu"))

    def receive(self, likes: Sequence[torch.Tensor], device: torch.device, source: int) -> Arriving:
        """Ask a stage for tensors of these shapes and dtypes; they are taken in even where nobody waits for them."""
        place = carrier(device, self.members)
        tensors = tuple(torch.empty(like.shape, dtype=like.dtype, device=place) for like in likes)
        with answering(self.members, "a transfer between stages"):
            works = [dist.irecv(each, group=self.members, group_src=source) for each in tensors if each.numel()]
        return self._keep(tensors, works, device)

    def _keep(
        self, tensors: tuple[torch.Tensor, ...], works: Sequence[dist.Work | None], device: torch.device
    ) -> Arriving:
        self._under_way.append(Arriving(tensors, [work for work in works if work is not None], self, device))
        return self._under_way[-1]

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """A tensor of one stage on all of them; others give one of its shape, which is filled."""
        moved = tensor.contiguous().to(carrier(tensor.device, self.members))
        start = functools.partial(dist.broadcast, moved, group=self.members, group_src=source, async_op=True)
        complete(self.members, "a broadcast over stages", start, moved.device)
        return moved.to(tensor.device)
