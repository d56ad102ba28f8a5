"""What other ranks left of a tensor that stays from call to call, put in its place when the next call wants it."""

from __future__ import annotations

import math

import torch

from .collectives import halo_finish

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
_LIBRARY.define(
    "stale_finish(Tensor(a!) state, Tensor arriving, int dim, SymInt[] counts, SymInt[] runs, str group) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "stale_finish", "CompositeExplicitAutograd")
def stale_finish(
    state: torch.Tensor, arriving: torch.Tensor, dim: int, counts: list[int], runs: list[int], group: str
) -> None:
    """Wait for rows that a ``halo_start`` of the call before asked for, and write them into a tensor.

    Args:
        state: any shape; changed in place.
        arriving: the rows, flat, rank by rank; an empty tensor where the call before asked for none, which changes
            nothing.
        dim: where rows are counted.
        counts: how many rows of each rank arrive.
        runs: where the rows belong, in order of arrival: first row and past-the-last row of each stretch of neighbours,
            none of which holds rows of two ranks.
        group: process group; empty for this rank alone.

    Raises:
        ValueError: when other rows arrive than there are places.
        AgreementError: when a peer fails or does not answer in time.
    """
    if not arriving.numel():
        return
    row = math.prod(size for at, size in enumerate(state.shape) if at != dim)
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    if not arriving.numel() == row * sum(counts) == row * sum(stop - start for start, stop in pairs):
        raise ValueError(f"{arriving.numel()} elements arrive for the rows {pairs} of {list(state.shape)}")
    left = iter(pairs)
    for count, flat in zip(counts, halo_finish(arriving, group).split([count * row for count in counts]), strict=True):
        rows, at = flat.view(*state.shape[:dim], count, *state.shape[dim + 1 :]), 0
        while at < count:
            start, stop = next(left)
            state.narrow(dim, start, stop - start).copy_(rows.narrow(dim, at, stop - start))
            at += stop - start


@torch.library.register_fake("xdit_compile::stale_finish", lib=_LIBRARY)
def _(state: torch.Tensor, arriving: torch.Tensor, dim: int, counts: list[int], runs: list[int], group: str) -> None:
    return None
