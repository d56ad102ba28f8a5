"""What other ranks left of a tensor that stays from call to call, put in its place when the next call wants it."""

from __future__ import annotations

import math

import torch

from .collectives import halo_finish

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
_LIBRARY.define(
    "stale_finish(Tensor(a!) state, Tensor arriving, int dim, SymInt[] starts, SymInt[] stops, str group) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "stale_finish", "CompositeExplicitAutograd")
def stale_finish(
    state: torch.Tensor, arriving: torch.Tensor, dim: int, starts: list[int], stops: list[int], group: str
) -> None:
    """Wait for rows that a ``halo_start`` of the call before asked for, and write them into a tensor.

    Args:
        state: any shape; changed in place.
        arriving: the rows, flat, rank by rank; an empty tensor where the call before asked for none, which changes
            nothing.
        dim: where rows are counted.
        starts, stops: where each run of rows belongs, in order of arrival; no run holds rows of two ranks.
        group: process group; empty for this rank alone.

    Raises:
        ValueError: when other rows arrive than there are places.
        AgreementError: when a peer fails or does not answer in time.
    """
    if not arriving.numel():
        return
    rows = halo_finish(arriving, group)
    runs = list(zip(starts, stops, strict=True))
    row = math.prod(size for at, size in enumerate(state.shape) if at != dim)
    if rows.numel() != row * sum(stop - start for start, stop in runs):
        raise ValueError(f"{rows.numel()} elements arrive for the rows {runs} of {list(state.shape)}")
    at = 0
    for start, stop in runs:
        place = state.narrow(dim, start, stop - start)
        place.copy_(rows[at : at + place.numel()].view(place.shape))
        at += place.numel()


@torch.library.register_fake("xdit_compile::stale_finish", lib=_LIBRARY)
def _(state: torch.Tensor, arriving: torch.Tensor, dim: int, starts: list[int], stops: list[int], group: str) -> None:
    return None
