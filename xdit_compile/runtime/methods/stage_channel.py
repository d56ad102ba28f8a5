"""Point-to-point transfers between the stages of a pipeline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from xdit_compile.distributed.mesh import Mesh, receive, send
from xdit_compile.distributed.messages import length, pack, unpack
from xdit_compile.kernels.collectives.process_groups import answering, carrier, complete, process_group

WHAT = "a transfer between stages"


@dataclasses.dataclass(eq=False)
class Incoming:
    """Tensors on their way to this rank, or from it, as one message.

    Args:
        message: its bytes.
        likes: tensors of their shapes and dtypes, where they come to this rank.
        device: where they are wanted.
    """

    message: torch.Tensor
    likes: Sequence[torch.Tensor]
    device: torch.device
    _works: list[dist.Work]
    _members: dist.ProcessGroup
    _tensors: tuple[torch.Tensor, ...] | None = None

    def settle(self) -> None:
        """Wait until the message is here, or gone.

        Raises:
            AgreementError: when the other rank fails or does not answer in time.
        """
        if self._works:
            with answering(self._members, WHAT):
                for work in self._works:
                    work.wait()
            self._works.clear()

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors, once they are here.

        Raises:
            AgreementError: when the sender fails or does not answer in time.
        """
        self.settle()
        if self._tensors is None:
            self._tensors = unpack(self.message.to(self.device), self.likes)
        return self._tensors


class Pipe:
    """One rank's ends of a pipeline: every message meets the receiver's request of the same order.

    Each pair of ranks has a process group of its own for each direction (`Mesh.edge`). What one group does it does in
    order: in a common one a stage could not send its first patch on before it had received its last.

    What is on its way is kept until the second call after, when it has arrived or will at once: no rank is further than
    one call ahead of another.

    Args:
        mesh: this rank's place.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._before: list[Incoming] = []
        self._under_way: list[Incoming] = []

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
            each.settle()
        self._before, self._under_way = self._under_way, []

    def send(self, tensors: Sequence[torch.Tensor], to: int) -> None:
        """Send tensors to a rank as one message, and go on at once. If all are empty, nothing is sent."""
        members = process_group(self._mesh.edge(self._mesh.rank, to))
        if any(each.numel() for each in tensors):
            message = pack(tensors, carrier(tensors[0].device, members))
            with answering(members, WHAT):
                works = send(message, to, members)
            self._under_way.append(Incoming(message, (), message.device, works, members))

    def receive(self, likes: Sequence[torch.Tensor], device: torch.device, source: int) -> Incoming:
        """Ask a rank for tensors of these shapes and dtypes; they are taken in even where nobody waits for them."""
        members = process_group(self._mesh.edge(source, self._mesh.rank))
        message = torch.empty(length(likes), dtype=torch.uint8, device=carrier(device, members))
        with answering(members, WHAT):
            works = receive(message, source, members) if len(message) else []
        self._under_way.append(Incoming(message, likes, device, works, members))
        return self._under_way[-1]

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """A tensor of one stage on all of them; others give one of its shape, which is filled."""
        members = process_group(self._mesh.group("pipefusion"))
        moved = tensor.contiguous().to(carrier(tensor.device, members))
        start = functools.partial(dist.broadcast, moved, group=members, group_src=source, async_op=True)
        complete(members, "a broadcast over stages", start, moved.device)
        return moved.to(tensor.device)
