"""Shards of all ranks end to end: at once, or begun now and read later."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .process_groups import answering, check_count, complete, hold, process_group
from .registration import Args, ArgsPerRank, agree, register
from .row_exchange import row_of

# torch 2.13 renamed it and warns about the name that 2.11 has.
_gather_even = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _check(x: torch.Tensor, dim: int, sizes: list[int]) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"all_gather along dim {dim} of a tensor with {x.dim()} dims")
    if x.shape[dim] not in sizes:
        raise ValueError(f"all_gather of a shard of {x.shape[dim]} where the ranks have {list(sizes)}")
    return dim % x.dim()


def _fake(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    dim = _check(x, dim, sizes)
    return x.new_empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]))


def _simulated(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    dim = _gathered_dim(args_per_rank)
    whole = torch.cat([args[0] for args in args_per_rank], dim)
    return [whole.clone(memory_format=torch.contiguous_format) for _ in args_per_rank]


def _gathered_dim(args_per_rank: ArgsPerRank) -> int:
    dim: int = args_per_rank[0][1]
    for rank, (_, _, sizes, _) in enumerate(args_per_rank):
        agree("all_gather sizes", rank, list(sizes), [args[0].shape[dim] for args in args_per_rank])
    return dim


def _sent(args: Args, group_size: int, index: int) -> int:
    """The own shard, to every other rank."""
    return int(math.prod(args[0].shape) * (group_size - 1))


@register("all_gather(Tensor x, int dim, SymInt[] sizes, str group) -> Tensor", _fake, _simulated, _sent)
def all_gather(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    """Concatenate the shards of all ranks along ``dim``, in group order.

    Args:
        x: this rank's shard.
        dim: the dimension that is split; may be negative.
        sizes: each rank's size there; uneven and zero are legal.
        group: process group; empty for this rank alone.

    Returns:
        The whole, ``sum(sizes)`` along ``dim``, contiguous.

    Raises:
        ValueError: when no rank has the size of ``x``.
        AgreementError: when a peer fails or does not answer in time.
    """
    dim = _check(x, dim, sizes)
    if not group:
        return x.clone(memory_format=torch.contiguous_format)
    members = process_group(group)
    check_count(members, len(sizes))
    out, as_it_is = _room(x, dim, sizes), x.shape[dim] == max(sizes) and x.is_contiguous()
    mine = x.view(-1) if as_it_is else _put_own(x, out, dim, sizes, dist.get_rank(members))
    if out.numel():
        complete(members, "an all-gather", lambda: _gather_even(out, mine, group=members, async_op=True), x.device)
    if len(set(sizes)) == 1 and math.prod(x.shape[:dim]) == 1:
        return out.view(*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :])
    return torch.cat(gathered(out, x.shape, dim, sizes), dim)


def _fake_start(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    return _room(x, _check(x, dim, sizes), sizes)


def _simulated_start(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    _gathered_dim(args_per_rank)
    room = max(math.prod(args[0].shape) for args in args_per_rank)
    shards = [args[0].reshape(-1) for args in args_per_rank]
    rooms = torch.cat([F.pad(shard, (0, room - len(shard))) for shard in shards])
    return [rooms.clone() for _ in args_per_rank]


@register("gather_start(Tensor x, int dim, SymInt[] sizes, str group) -> Tensor", _fake_start, _simulated_start, _sent)
def gather_start(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    """Begin what ``all_gather`` does, and go on at once; what it returns may be read only after ``stale_finish``.

    Args, raises: as ``all_gather``.

    Returns:
        Room for the shards of all ranks: flat, in group order, for each as much as the largest takes.
    """
    dim = _check(x, dim, sizes)
    out = _room(x, dim, sizes)
    if not group:
        _put_own(x, out, dim, sizes, 0)
    elif out.numel():
        members = process_group(group)
        check_count(members, len(sizes))
        mine = _put_own(x, out, dim, sizes, dist.get_rank(members))
        with answering(members, "an exchange of shards"):
            work = _gather_even(out, mine, group=members, async_op=True)
        hold(out, work, members)
    return out


def _room(x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    """Backends gather equal amounts alone; other ways to gather unequal ones send from a copy for each peer."""
    return x.new_empty(len(sizes) * max(sizes) * row_of(x.shape, dim))


def _put_own(x: torch.Tensor, out: torch.Tensor, dim: int, sizes: Sequence[int], index: int) -> torch.Tensor:
    """Put this rank's shard in its place among all, and give the place: gathered from there it needs no other."""
    most = max(sizes) * row_of(x.shape, dim)
    mine = out.narrow(0, index * most, most)
    mine.narrow(0, 0, x.numel()).view(x.shape).copy_(x)
    return mine


def gathered(out: torch.Tensor, shape: Sequence[int], dim: int, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Views of the shards in what has room for all, in group order; ``shape`` is that of one of them."""
    row = row_of(shape, dim)
    return [
        room.narrow(0, 0, size * row).view(*shape[:dim], size, *shape[dim + 1 :])
        for room, size in zip(out.view(len(sizes), max(sizes) * row), sizes, strict=True)
    ]
