"""What ops that reach other ranks share: finding the process group, keeping their order, reporting a failed wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.distributed import distributed_c10d

from xdit_compile.errors import AgreementError
from xdit_compile.mesh import first_sentence, is_simulated


def keep_in_order(op: torch._ops.OpOverload) -> None:
    """Have compilers run every call of an op, and all such calls in the order of the graph.

    Ranks compile different graphs. Left free, inductor drops a collective whose result is empty on this rank only, and
    may order independent ones by sizes that differ between ranks; the peers then wait for ever. With inductor the order
    also takes ``inductor_order.pin_order``.
    """
    _register_effectful_op(op, _EffectType.ORDERED)


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of that name.

    Raises:
        AgreementError: when no such group exists in this process, or the name is a simulated one.
    """
    if is_simulated(name):
        raise AgreementError(f"group {name!r} is simulated and cannot carry data; run its ops through simulate")
    try:
        return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise AgreementError(
            f"there is no process group {name!r} here ({first_sentence(error)}); make the mesh in this process first"
        ) from error


@contextmanager
def answering(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Turn the failure of a transfer into one line that names the ranks concerned.

    Raises:
        AgreementError: when a peer died or did not answer within the group's limit.
    """
    try:
        yield
    except RuntimeError as error:
        raise AgreementError(
            f"{what} over ranks {dist.get_process_group_ranks(group)} failed on rank {dist.get_rank()} "
            f"({first_sentence(error)}); a peer stopped or did not answer in time, look at the first rank that failed"
        ) from error
