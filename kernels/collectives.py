"""Collectives as single ops with uneven sizes: what a rewritten graph calls, eagerly or compiled.

Each names its process group; the empty name means this rank alone, for which every one is a copy. Each has a fake, so a
graph that calls them compiles whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from xdit_compile.distributed.mesh import is_simulated

from .process_groups import answering, complete, hold, keep_in_order, process_group, settle
from .row_exchange import RowExchange, count, row_of

_REDUCTIONS = ("sum", "max")

# torch 2.13 renamed it and warns about the name that 2.11 has.
_gather_even = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
for _schema in (
    "all_to_all(Tensor x, SymInt[] out_splits, SymInt[] in_splits, str group) -> Tensor",
    "all_gather(Tensor x, int dim, SymInt[] sizes, str group) -> Tensor",
    'all_reduce(Tensor x, str group, str op="sum") -> Tensor',
    "halo_exchange(Tensor x, int dim, SymInt[] starts, SymInt[] stops, SymInt[] sizes, int index, str group) -> Tensor",
    "halo_start(Tensor x, int dim, SymInt[] starts, SymInt[] stops, SymInt[] sizes, int index, str group) -> Tensor",
    "halo_finish(Tensor arriving, Tensor here, int dim, int at, int rows, bool before, int zeros, str group) -> Tensor",
    "gather_start(Tensor x, int dim, SymInt[] sizes, str group) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_LIBRARY, "all_to_all", "CompositeExplicitAutograd")
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
    _check_all_to_all(x, out_splits, in_splits)
    if not group:
        return x.clone()
    out = x.new_empty(sum(out_splits))
    members = process_group(group)
    _check_count(members, len(in_splits))
    away, splits = x.contiguous(), (list(out_splits), list(in_splits))
    start = functools.partial(dist.all_to_all_single, out, away, *splits, group=members, async_op=True)
    complete(members, "an all-to-all", start, x.device)
    return out


@torch.library.register_fake("xdit_compile::all_to_all", lib=_LIBRARY)
def _(x: torch.Tensor, out_splits: list[int], in_splits: list[int], group: str) -> torch.Tensor:
    _check_all_to_all(x, out_splits, in_splits)
    return x.new_empty(sum(out_splits))


def _check_all_to_all(x: torch.Tensor, out_splits: list[int], in_splits: list[int]) -> None:
    if x.dim() != 1 or x.shape[0] != sum(in_splits):
        raise ValueError(f"all_to_all takes {sum(in_splits)} elements in one dimension, not {tuple(x.shape)}")
    if len(out_splits) != len(in_splits):
        raise ValueError(f"all_to_all needs one split per rank each way, not {out_splits} and {in_splits}")


@torch.library.impl(_LIBRARY, "all_gather", "CompositeExplicitAutograd")
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
    dim = _check_all_gather(x, dim, sizes)
    if not group:
        return x.clone(memory_format=torch.contiguous_format)
    members = process_group(group)
    _check_count(members, len(sizes))
    out, as_it_is = _room(x, dim, sizes), x.shape[dim] == max(sizes) and x.is_contiguous()
    mine = x.view(-1) if as_it_is else _put_own(x, out, dim, sizes, dist.get_rank(members))
    if out.numel():
        complete(members, "an all-gather", lambda: _gather_even(out, mine, group=members, async_op=True), x.device)
    if len(set(sizes)) == 1 and math.prod(x.shape[:dim]) == 1:
        return out.view(*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :])
    return torch.cat(gathered(out, x.shape, dim, sizes), dim)


@torch.library.register_fake("xdit_compile::all_gather", lib=_LIBRARY)
def _(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    dim = _check_all_gather(x, dim, sizes)
    return x.new_empty((*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :]))


def _check_all_gather(x: torch.Tensor, dim: int, sizes: list[int]) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"all_gather along dim {dim} of a tensor with {x.dim()} dims")
    if x.shape[dim] not in sizes:
        raise ValueError(f"all_gather of a shard of {x.shape[dim]} where the ranks have {list(sizes)}")
    return dim % x.dim()


@torch.library.impl(_LIBRARY, "gather_start", "CompositeExplicitAutograd")
def gather_start(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    """Begin what ``all_gather`` does, and go on at once; what it returns may be read only after ``stale_finish``.

    Args, raises: as ``all_gather``.

    Returns:
        Room for the shards of all ranks: flat, in group order, for each as much as the largest takes.
    """
    dim = _check_all_gather(x, dim, sizes)
    out = _room(x, dim, sizes)
    if not group:
        _put_own(x, out, dim, sizes, 0)
    elif out.numel():
        members = process_group(group)
        _check_count(members, len(sizes))
        mine = _put_own(x, out, dim, sizes, dist.get_rank(members))
        with answering(members, "an exchange of shards"):
            work = _gather_even(out, mine, group=members, async_op=True)
        hold(out, work, members)
    return out


@torch.library.register_fake("xdit_compile::gather_start", lib=_LIBRARY)
def _(x: torch.Tensor, dim: int, sizes: list[int], group: str) -> torch.Tensor:
    return _room(x, _check_all_gather(x, dim, sizes), sizes)


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


@torch.library.impl(_LIBRARY, "all_reduce", "CompositeExplicitAutograd")
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
    _check_reduction(op)
    out = x.clone(memory_format=torch.contiguous_format)
    if group and out.numel():
        members = process_group(group)
        how = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        start = functools.partial(dist.all_reduce, out, op=how, group=members, async_op=True)
        complete(members, "an all-reduce", start, x.device)
    return out


@torch.library.register_fake("xdit_compile::all_reduce", lib=_LIBRARY)
def _(x: torch.Tensor, group: str, op: str = "sum") -> torch.Tensor:
    _check_reduction(op)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_reduction(op: str) -> None:
    if op not in _REDUCTIONS:
        raise ValueError(f"all_reduce with op={op!r}; use one of {', '.join(_REDUCTIONS)}")


@torch.library.impl(_LIBRARY, "halo_exchange", "CompositeExplicitAutograd")
def halo_exchange(
    x: torch.Tensor, dim: int, starts: list[int], stops: list[int], sizes: list[int], index: int, group: str
) -> torch.Tensor:
    """Give every rank the rows that it asks for along ``dim``, which is split over the ranks.

    Most often these are a rank's own rows and some of its neighbours'; whoever has them sends them.

    Args:
        x: this rank's shard.
        dim: the dimension that is split; may be negative.
        starts, stops: the first row that each rank asks for and the one past its last, in group order; a rank for which
            they are equal gets none.
        sizes: each rank's rows, in group order; zero is legal.
        index: this rank's position in the group.
        group: process group; empty for this rank alone.

    Returns:
        ``stops[index] - starts[index]`` rows, contiguous, in new memory.

    Raises:
        ValueError: when ``x`` has not ``sizes[index]`` rows, or rows beyond the ends are asked for.
        AgreementError: when a peer fails or does not answer in time.
    """
    rows = RowExchange.of(dim, starts, stops, sizes, index, group).checked(x)
    if not group:
        return x.narrow(rows.dim, starts[0], stops[0] - starts[0]).clone(memory_format=torch.contiguous_format)
    _check_place(process_group(group), index)
    return rows.joined(x, all_to_all(*rows.packed(x), group))


@torch.library.impl(_LIBRARY, "halo_start", "CompositeExplicitAutograd")
def halo_start(
    x: torch.Tensor, dim: int, starts: list[int], stops: list[int], sizes: list[int], index: int, group: str
) -> torch.Tensor:
    """Begin what ``halo_exchange`` does, and go on at once: the rows of other ranks alone, flat, rank by rank.

    Ranks may meet one another's ``halo_exchange`` with it. What it returns may be read only after ``halo_finish``.

    Args, raises: as ``halo_exchange``.
    """
    away, out_splits, in_splits = RowExchange.of(dim, starts, stops, sizes, index, group).checked(x).packed(x)
    out = x.new_empty(sum(out_splits))
    if group:
        members = process_group(group)
        _check_place(members, index)
        _check_count(members, len(in_splits))
        with answering(members, "an exchange of rows"):
            work = dist.all_to_all_single(out, away, out_splits, in_splits, group=members, async_op=True)
        hold(out, work, members)
    return out


@torch.library.register_fake("xdit_compile::halo_start", lib=_LIBRARY)
def _(
    x: torch.Tensor, dim: int, starts: list[int], stops: list[int], sizes: list[int], index: int, group: str
) -> torch.Tensor:
    rows = RowExchange.of(dim, starts, stops, sizes, index, group).checked(x)
    return x.new_empty(count(rows.got) * row_of(x.shape, rows.dim))


@torch.library.impl(_LIBRARY, "halo_finish", "CompositeExplicitAutograd")
def halo_finish(
    arriving: torch.Tensor, here: torch.Tensor, dim: int, at: int, rows: int, before: bool, zeros: int, group: str
) -> torch.Tensor:
    """Wait for the rows that ``halo_start`` asked for, and join some of them with rows that are here.

    Args:
        arriving: what ``halo_start`` gave.
        here: neighbours of the rows that arrive.
        dim: where rows are counted.
        at, rows: the first element of the rows, and how many there are.
        before: whether they come before those that are here, or after.
        zeros: rows of zeros on their other side.
        group: process group; empty for this rank alone.

    Returns:
        All of them along ``dim``, in new memory.

    Raises:
        AgreementError: when a peer fails or does not answer in time.
    """
    if group and not is_simulated(group):
        settle(arriving, "an exchange of rows")
    return _beside(arriving, here, dim, at, rows, before, zeros)


@torch.library.register_fake("xdit_compile::halo_finish", lib=_LIBRARY)
def _(
    arriving: torch.Tensor, here: torch.Tensor, dim: int, at: int, rows: int, before: bool, zeros: int, group: str
) -> torch.Tensor:
    return _beside(arriving, here, dim, at, rows, before, zeros)


def _beside(
    arriving: torch.Tensor, here: torch.Tensor, dim: int, at: int, rows: int, before: bool, zeros: int
) -> torch.Tensor:
    shape, edge = list(here.shape), list(here.shape)
    shape[dim], edge[dim] = rows, zeros
    there = arriving.narrow(0, at, math.prod(shape)).view(shape)
    parts = [here, there] if not zeros else [here, there, here.new_zeros(edge)]
    return torch.cat(parts[::-1] if before else parts, dim)


@torch.library.register_fake("xdit_compile::halo_exchange", lib=_LIBRARY)
def _(
    x: torch.Tensor, dim: int, starts: list[int], stops: list[int], sizes: list[int], index: int, group: str
) -> torch.Tensor:
    dim = RowExchange.of(dim, starts, stops, sizes, index, group).checked(x).dim
    return x.new_empty((*x.shape[:dim], stops[index] - starts[index], *x.shape[dim + 1 :]))


def _check_place(members: dist.ProcessGroup, index: int) -> None:
    if dist.get_rank(members) != index:
        raise ValueError(f"halo_exchange at position {index} of a group where this rank has another; pass its own")


def _check_count(members: dist.ProcessGroup, count: int) -> None:
    if dist.get_world_size(members) != count:
        raise ValueError(f"{count} sizes for a group of {dist.get_world_size(members)} ranks")


for _op in ("all_to_all", "all_gather", "gather_start", "all_reduce", "halo_exchange", "halo_start", "halo_finish"):
    keep_in_order(getattr(torch.ops.xdit_compile, _op).default)
