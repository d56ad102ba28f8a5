"""Pieces of any size from every rank to every rank."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from .process_groups import check_count, complete, process_group
from .registration import Args, ArgsPerRank, agree, register


def _check(x: torch.Tensor, out_splits: list[int], in_splits: list[int]) -> None:
    if x.dim() != 1 or x.shape[0] != sum(in_splits):
        raise ValueError(f"all_to_all takes {sum(in_splits)} elements in one dimension, not {tuple(x.shape)}")
    if len(out_splits) != len(in_splits):
        raise ValueError(f"all_to_all needs one split per rank each way, not {out_splits} and {in_splits}")


def _fake(x: torch.Tensor, out_splits: list[int], in_splits: list[int], group: str) -> torch.Tensor:
    _check(x, out_splits, in_splits)
    return x.new_empty(sum(out_splits))


def simulated(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    """Each rank's pieces, in group order."""
    pieces = [x.split(list(in_splits)) for x, _, in_splits, _ in args_per_rank]
    results = []
    for rank, (_, out_splits, _, _) in enumerate(args_per_rank):
        arriving = [piece[rank] for piece in pieces]
        agree("all_to_all splits", rank, list(out_splits), [len(piece) for piece in arriving])
        results.append(torch.cat(arriving))
    return results


def _sent(args: Args, group_size: int, index: int) -> int:
    """What goes to others."""
    in_splits = args[2]
    return int(sum(in_splits) - in_splits[index])


@register("all_to_all(Tensor x, SymInt[] out_splits, SymInt[] in_splits, str group) -> Tensor", _fake, simulated, _sent)
def all_to_all(x: torch.Tensor, out_splits: list[int], in_splits: list[int], group: str) -> torch.Tensor:
    """Give each rank of the group its piece of ``x`` and concatenate the pieces that come back, in group order.

    Args:
        x: ``[sum(in_splits)]``, any dtype.
        out_splits: elements that come from each rank; zeros are legal.
        in_splits: elements that go to each rank; zeros are legal.
        group: process group; empty for this rank alone.

    Returns:
        ``[sum(out_splits)]``.

    Raises:
        ValueError: when the splits do not fit ``x`` or each other.
        AgreementError: when a peer fails or does not answer in time.
    """
    _check(x, out_splits, in_splits)
    if not group:
        return x.clone()
    out = x.new_empty(sum(out_splits))
    members = process_group(group)
    check_count(members, len(in_splits))
    away, splits = x.contiguous(), (list(out_splits), list(in_splits))
    start = functools.partial(dist.all_to_all_single, out, away, *splits, group=members, async_op=True)
    complete(members, "an all-to-all", start, x.device)
    return out
