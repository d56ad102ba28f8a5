"""Sums, or greatest elements, over all ranks."""

from __future__ import annotations

import functools
import math

import torch
import torch.distributed as dist

from .process_groups import complete, process_group
from .registration import Args, ArgsPerRank, agree, register

_REDUCTIONS = ("sum", "max")


def _check(op: str) -> None:
    if op not in _REDUCTIONS:
        raise ValueError(f"all_reduce with op={op!r}; use one of {', '.join(_REDUCTIONS)}")


def _fake(x: torch.Tensor, group: str, op: str = "sum") -> torch.Tensor:
    _check(op)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _simulated(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    kinds = [args[2] if len(args) > 2 else "sum" for args in args_per_rank]
    for rank, (kind, (x, *_)) in enumerate(zip(kinds, args_per_rank, strict=True)):
        agree("all_reduce", rank, (kind, x.shape), (kinds[0], args_per_rank[0][0].shape))
    stacked = torch.stack([args[0] for args in args_per_rank])
    result = stacked.sum(0, dtype=stacked.dtype) if kinds[0] == "sum" else stacked.amax(0)
    return [result.clone(memory_format=torch.contiguous_format) for _ in args_per_rank]


def _sent(args: Args, group_size: int, index: int) -> int:
    """``2 numel (n - 1) / n`` as in the ring algorithm, rounded down."""
    return 2 * math.prod(args[0].shape) * (group_size - 1) // group_size


@register('all_reduce(Tensor x, str group, str op="sum") -> Tensor', _fake, _simulated, _sent)
def all_reduce(x: torch.Tensor, group: str, op: str = "sum") -> torch.Tensor:
    """Combine the tensors of all ranks element by element.

    Args:
        x: the same shape on every rank.
        group: process group; empty for this rank alone.
        op: ``sum`` or ``max``.

    Returns:
        A new contiguous tensor, the same on every rank.

    Raises:
        ValueError: for another ``op``.
        AgreementError: when a peer fails or does not answer in time.
    """
    _check(op)
    out = x.clone(memory_format=torch.contiguous_format)
    if group and out.numel():
        members = process_group(group)
        how = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        start = functools.partial(dist.all_reduce, out, op=how, group=members, async_op=True)
        complete(members, "an all-reduce", start, x.device)
    return out
