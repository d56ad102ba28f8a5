"""What other ranks left of a tensor that stays from call to call, put in its place when the next call wants it."""

from __future__ import annotations

import torch

from xdit_compile.distributed.mesh import is_simulated

from .collectives.process_groups import settle
from .collectives.row_exchange import row_of

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
_LIBRARY.define(
    "stale_finish(Tensor(a!) state, Tensor(b!) arriving, int dim, SymInt[] counts, SymInt[] runs, int room, "
    "str group) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "stale_finish", "CompositeExplicitAutograd")
def stale_finish(
    state: torch.Tensor, arriving: torch.Tensor, dim: int, counts: list[int], runs: list[int], room: int, group: str
) -> None:
    """Wait for rows that the call before asked for, write them into a tensor, and let go of the memory they came in.

    Whoever called holds what arrived until the call ends, and the call has as much on its way for the next one.

    Args:
        state: any shape; changed in place.
        arriving: the rows, flat, rank by rank; empty afterwards. An empty tensor, where the call before asked for
            none, changes nothing.
        dim: where rows are counted.
        counts: how many rows of each rank belong into ``state``.
        runs: where, in order of arrival: first row and past-the-last row of each stretch of neighbours, none of which
            holds rows of two ranks.
        room: how many rows each rank has room for, after ``gather_start``; 0 after ``halo_start``, whose rows leave no
            gaps.
        group: process group; empty for this rank alone.

    Raises:
        ValueError: when other rows arrive than there are places.
        AgreementError: when a peer fails or does not answer in time.
    """
    if group and not is_simulated(group):
        settle(arriving, "an exchange of the step before")
    if not arriving.numel():
        return
    row, pairs = row_of(state.shape, dim), list(zip(runs[::2], runs[1::2], strict=True))
    rooms = [room or count for count in counts]
    if arriving.numel() != row * sum(rooms) or sum(counts) != sum(stop - start for start, stop in pairs):
        raise ValueError(f"{arriving.numel()} elements arrive for the rows {pairs} of {list(state.shape)}")
    left = iter(pairs)
    for count, flat in zip(counts, arriving.split([each * row for each in rooms]), strict=True):
        rows, at = flat.narrow(0, 0, count * row).view(*state.shape[:dim], count, *state.shape[dim + 1 :]), 0
        while at < count:
            start, stop = next(left)
            state.narrow(dim, start, stop - start).copy_(rows.narrow(dim, at, stop - start))
            at += stop - start
    arriving.set_()  # type: ignore[call-overload]


@torch.library.register_fake("xdit_compile::stale_finish", lib=_LIBRARY)
def _(
    state: torch.Tensor, arriving: torch.Tensor, dim: int, counts: list[int], runs: list[int], room: int, group: str
) -> None:
    return None
