"""Pieces of any size from every rank to every rank: at once, or begun now and read later."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from xdit_compile.distributed.mesh import is_simulated

from .process_groups import answering, check_count, complete, hold, process_group, settle
from .registration import Args, ArgsPerRank, agree, register, register_ordered

_SPLITS = "Tensor x, SymInt[] out_splits, SymInt[] in_splits, str group"


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


@register(f"all_to_all({_SPLITS}) -> Tensor", _fake, simulated, _sent)
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


@register(f"all_to_all_start({_SPLITS}) -> Tensor", _fake, simulated, _sent)
def all_to_all_start(x: torch.Tensor, out_splits: list[int], in_splits: list[int], group: str) -> torch.Tensor:
    """Begin what ``all_to_all`` does, and go on at once.

    What it returns may be read only after ``all_to_all_finish``, and ``x`` may not be written to before.

    Args, returns, raises: as ``all_to_all``.
    """
    _check(x, out_splits, in_splits)
    if not group:
        return x.clone()
    return begun(x.contiguous(), list(out_splits), list(in_splits), process_group(group), "an all-to-all")


def begun(
    x: torch.Tensor, out_splits: list[int], in_splits: list[int], members: dist.ProcessGroup, what: str
) -> torch.Tensor:
    """What an all-to-all over ``members`` fills, while it is under way.

    Args:
        x: contiguous.
        what: the exchange in words, for errors.

    Raises:
        ValueError: for splits of another number of ranks.
        AgreementError: when a peer fails.
    """
    out = x.new_empty(sum(out_splits))
    check_count(members, len(in_splits))
    with answering(members, what):
        work = dist.all_to_all_single(out, x, out_splits, in_splits, group=members, async_op=True)
    hold(out, work, members)
    return out


def _fake_settle(arriving: torch.Tensor, sent: torch.Tensor, group: str) -> None:
    return None


@register_ordered("all_to_all_settle(Tensor(a!) arriving, Tensor sent, str group) -> ()", _fake_settle)
def all_to_all_settle(arriving: torch.Tensor, sent: torch.Tensor, group: str) -> None:
    """Wait for what ``all_to_all_start`` began: what ``all_to_all_finish`` is to a compiler that plans memory itself.

    Args:
        arriving: what ``all_to_all_start`` gave; has its values afterwards.
        sent: what it was given. It is not read: as an argument it keeps its memory until here, where a compiler would
            have written something else there.
        group: process group; empty for this rank alone.

    Raises:
        AgreementError: when a peer fails or does not answer in time.
    """
    if group and not is_simulated(group):
        settle(arriving, "an all-to-all")


def _fake_finish(arriving: torch.Tensor, sent: torch.Tensor, group: str) -> torch.Tensor:
    return torch.empty_like(arriving)


@register_ordered("all_to_all_finish(Tensor arriving, Tensor sent, str group) -> Tensor", _fake_finish)
def all_to_all_finish(arriving: torch.Tensor, sent: torch.Tensor, group: str) -> torch.Tensor:
    """Wait for what ``all_to_all_start`` began.

    Nothing is copied: the result is ``arriving`` itself, which nobody may read but through it. A graph is functional
    with it; whoever gives memory to tensors by a plan of its own, as inductor, has to take ``all_to_all_settle``.

    Args, raises: as ``all_to_all_settle``.

    Returns:
        The pieces, as ``all_to_all`` returns them; in new memory for this rank alone.
    """
    if not group:
        return arriving.clone()
    all_to_all_settle(arriving, sent, group)
    return arriving
