"""Rows of neighbours along a split dim: at once, or begun now and read later."""

from __future__ import annotations

import math

import torch

from xdit_compile.distributed.mesh import is_simulated

from .all_to_all import all_to_all, begun
from .all_to_all import simulated as simulated_all_to_all
from .process_groups import check_place, process_group, settle
from .registration import Args, ArgsPerRank, Finish, agree, register, register_ordered
from .row_exchange import RowExchange, count, row_of

_ROWS = "Tensor x, int dim, SymInt[] starts, SymInt[] stops, SymInt[] sizes, int index, str group"


def _fake(
    x: torch.Tensor, dim: int, starts: list[int], stops: list[int], sizes: list[int], index: int, group: str
) -> torch.Tensor:
    dim = RowExchange.of(dim, starts, stops, sizes, index, group).checked(x).dim
    return x.new_empty((*x.shape[:dim], stops[index] - starts[index], *x.shape[dim + 1 :]))


def _simulated(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    whole = torch.cat([args[0] for args in args_per_rank], args_per_rank[0][1])
    results = []
    for rank, (_, dim, starts, stops, sizes, index, _) in enumerate(args_per_rank):
        agree("halo_exchange sizes", rank, list(sizes), [args[0].shape[dim] for args in args_per_rank])
        agree("halo_exchange index", rank, index, rank)
        agree("halo_exchange rows", rank, (starts, stops), args_per_rank[0][2:4])
        rows = whole.narrow(dim, starts[rank], stops[rank] - starts[rank])
        results.append(rows.clone(memory_format=torch.contiguous_format))
    return results


def _sent(args: Args, group_size: int, index: int) -> int:
    """The rows that others ask for."""
    x, dim, starts, stops, sizes, *_ = args
    return RowExchange.of(dim % x.dim(), starts, stops, sizes, index).elements_sent(x.shape)


def _as_all_to_all(args: Args) -> tuple[Args, Finish]:
    x, *rows = args
    exchange = RowExchange.of(*rows).checked(x)
    return (*exchange.packed(x), exchange.group), lambda arrived: exchange.joined(x, arrived)


@register(f"halo_exchange({_ROWS}) -> Tensor", _fake, _simulated, _sent, _as_all_to_all)
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
    check_place(process_group(group), index, "halo_exchange")
    return rows.joined(x, all_to_all(*rows.packed(x), group))


def _fake_start(
    x: torch.Tensor, dim: int, starts: list[int], stops: list[int], sizes: list[int], index: int, group: str
) -> torch.Tensor:
    rows = RowExchange.of(dim, starts, stops, sizes, index, group).checked(x)
    return x.new_empty(count(rows.got) * row_of(x.shape, rows.dim))


def _simulated_start(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    sent = [RowExchange.of(*rows).checked(x).packed(x) for x, *rows in args_per_rank]
    return simulated_all_to_all([(*each, "") for each in sent])


def _start_as_all_to_all(args: Args) -> tuple[Args, Finish]:
    return _as_all_to_all(args)[0], lambda arrived: arrived


@register(f"halo_start({_ROWS}) -> Tensor", _fake_start, _simulated_start, _sent, _start_as_all_to_all)
def halo_start(
    x: torch.Tensor, dim: int, starts: list[int], stops: list[int], sizes: list[int], index: int, group: str
) -> torch.Tensor:
    """Begin what ``halo_exchange`` does, and go on at once: the rows of other ranks alone, flat, rank by rank.

    Ranks may meet one another's ``halo_exchange`` with it. What it returns may be read only after ``halo_finish``.

    Args, raises: as ``halo_exchange``.
    """
    away, out_splits, in_splits = RowExchange.of(dim, starts, stops, sizes, index, group).checked(x).packed(x)
    if not group:
        return x.new_empty(sum(out_splits))
    members = process_group(group)
    check_place(members, index, "halo_exchange")
    return begun(away, out_splits, in_splits, members, "an exchange of rows")


def _fake_finish(
    arriving: torch.Tensor, here: torch.Tensor, dim: int, at: int, rows: int, before: bool, zeros: int, group: str
) -> torch.Tensor:
    return _beside(arriving, here, dim, at, rows, before, zeros)


@register_ordered(
    "halo_finish(Tensor arriving, Tensor here, int dim, int at, int rows, bool before, int zeros, str group) -> Tensor",
    _fake_finish,
)
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


def _fake_finish_both(
    arriving: torch.Tensor, above: torch.Tensor, below: torch.Tensor, dim: int, at: list[int], rows: list[int],
    zeros: list[int], group: str,
) -> torch.Tensor:  # fmt: skip
    return _both(arriving, above, below, dim, at, rows, zeros)


@register_ordered(
    "halo_finish_both(Tensor arriving, Tensor above, Tensor below, int dim, int[] at, int[] rows, int[] zeros, "
    "str group) -> Tensor",
    _fake_finish_both,
)
def halo_finish_both(
    arriving: torch.Tensor, above: torch.Tensor, below: torch.Tensor, dim: int, at: list[int], rows: list[int],
    zeros: list[int], group: str,
) -> torch.Tensor:  # fmt: skip
    """Both ends of a shard at once: `halo_finish` with rows before ``above`` and with rows after ``below``.

    Args:
        arriving: what ``halo_start`` gave.
        above, below: the first and the last rows that are here, as many of each where as many come.
        dim: where rows are counted, not the first one.
        at, rows, zeros: as of ``halo_finish``, of the one end and of the other.
        group: process group; empty for this rank alone.

    Returns:
        The one end behind the other along dim 0, in new memory.

    Raises:
        ValueError: when the ends differ in size.
        AgreementError: when a peer fails or does not answer in time.
    """
    if group and not is_simulated(group):
        settle(arriving, "an exchange of rows")
    return _both(arriving, above, below, dim, at, rows, zeros)


def _both(
    arriving: torch.Tensor, above: torch.Tensor, below: torch.Tensor, dim: int, at: list[int], rows: list[int],
    zeros: list[int],
) -> torch.Tensor:  # fmt: skip
    pieces = [
        _pieces(arriving, above, dim, at[0], rows[0], True, zeros[0]),
        _pieces(arriving, below, dim, at[1], rows[1], False, zeros[1]),
    ]
    first, second = (_size(piece, dim) for piece in pieces)
    if first != second or dim == 0:
        raise ValueError(f"halo_finish_both along dim {dim} of ends of {first} and {second}")
    result = _room([2 * first[0], *first[1:]], above)
    for piece, room in zip(pieces, result.chunk(2), strict=True):
        torch.cat(piece, dim, out=room)
    return result


def _beside(
    arriving: torch.Tensor, here: torch.Tensor, dim: int, at: int, rows: int, before: bool, zeros: int
) -> torch.Tensor:
    pieces = _pieces(arriving, here, dim, at, rows, before, zeros)
    return torch.cat(pieces, dim, out=_room(_size(pieces, dim), here))


def _pieces(
    arriving: torch.Tensor, here: torch.Tensor, dim: int, at: int, rows: int, before: bool, zeros: int
) -> list[torch.Tensor]:
    """What is joined along ``dim``, in order."""
    shape, edge = list(here.shape), list(here.shape)
    shape[dim], edge[dim] = rows, zeros
    there = arriving.narrow(0, at, math.prod(shape)).view(shape)
    parts = [here, there] if not zeros else [here, there, here.new_zeros(edge)]
    return parts[::-1] if before else parts


def _size(pieces: list[torch.Tensor], dim: int) -> list[int]:
    size = list(pieces[0].shape)
    size[dim] = sum(piece.shape[dim] for piece in pieces)
    return size


def _room(size: list[int], like: torch.Tensor) -> torch.Tensor:
    """Memory in which dims lie in the order of another tensor's, so that whoever reads that one reads this as well."""
    order = sorted(range(like.dim()), key=lambda dim: -like.stride()[dim])
    return torch.empty_permuted(size, order, dtype=like.dtype, device=like.device)
