"""Sums over all ranks of which each gets its own positions alone."""

from __future__ import annotations

import math

import torch

from .all_to_all import all_to_all
from .process_groups import check_count, check_place, process_group
from .registration import Args, ArgsPerRank, Finish, agree, register
from .row_exchange import row_of


def _check(x: torch.Tensor, dim: int, sizes: list[int], index: int) -> int:
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != sum(sizes):
        raise ValueError(f"reduce_scatter along dim {dim} of {tuple(x.shape)} into {list(sizes)}")
    if not 0 <= index < len(sizes):
        raise ValueError(f"reduce_scatter at position {index} of {len(sizes)} ranks")
    return dim % x.dim()


def _fake(x: torch.Tensor, dim: int, sizes: list[int], index: int, group: str) -> torch.Tensor:
    dim = _check(x, dim, sizes, index)
    return x.new_empty((*x.shape[:dim], sizes[index], *x.shape[dim + 1 :]))


def _simulated(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    _, dim, sizes, *_ = args_per_rank[0]
    for rank, (x, *said, index, _) in enumerate(args_per_rank):
        agree("reduce_scatter", rank, (x.shape, *said, index), (args_per_rank[0][0].shape, dim, sizes, rank))
    stacked = torch.stack([args[0] for args in args_per_rank])
    total = stacked.sum(0, dtype=stacked.dtype)
    return [each.clone(memory_format=torch.contiguous_format) for each in total.split(list(sizes), dim)]


def _sent(args: Args, group_size: int, index: int) -> int:
    """What is summed at others' positions."""
    x, dim, sizes, *_ = args
    return int((sum(sizes) - sizes[index]) * row_of(x.shape, dim % x.dim()))


def _as_all_to_all(args: Args) -> tuple[Args, Finish]:
    x, dim, sizes, index, group = args
    dim = _check(x, dim, sizes, index)
    shape = [*x.shape[:dim], sizes[index], *x.shape[dim + 1 :]]
    packed = torch.cat([each.reshape(-1) for each in x.split(list(sizes), dim)])
    row, mine = row_of(x.shape, dim), math.prod(shape)

    def finish(arrived: torch.Tensor) -> torch.Tensor:
        return arrived.view(len(sizes), *shape).sum(0, dtype=x.dtype)

    return (packed, [mine] * len(sizes), [size * row for size in sizes], group), finish


@register(
    "reduce_scatter(Tensor x, int dim, SymInt[] sizes, int index, str group) -> Tensor",
    _fake,
    _simulated,
    _sent,
    _as_all_to_all,
)
def reduce_scatter(x: torch.Tensor, dim: int, sizes: list[int], index: int, group: str) -> torch.Tensor:
    """Add up the tensors of all ranks, and keep this rank's positions of the sum.

    Every rank adds in the order of the group. Backends scatter equal amounts alone, so pieces are sent to whoever adds
    them, of any size.

    Args:
        x: the same shape on every rank.
        dim: the dimension that is split; may be negative.
        sizes: each rank's positions there, in group order; uneven and zero are legal.
        index: this rank's position in the group.
        group: process group; empty for this rank alone.

    Returns:
        ``sizes[index]`` positions along ``dim``, contiguous, in new memory.

    Raises:
        ValueError: when ``sizes`` do not make up the dim, or the position is another.
        AgreementError: when a peer fails or does not answer in time.
    """
    if not group:
        return x.clone(memory_format=torch.contiguous_format)
    members = process_group(group)
    check_count(members, len(sizes))
    check_place(members, index, "reduce_scatter")
    (packed, received, sent, _), finish = _as_all_to_all((x, dim, sizes, index, group))
    return finish(all_to_all(packed, received, sent, group))
