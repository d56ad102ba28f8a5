"""Makes a parameter whole again from the slices that the ranks of a group hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from xdit_compile.ir.program import WeightSlice
from xdit_compile.weights.weights import place

from .collectives.process_groups import answering, carrier, process_group


def gather_whole(group: str, shape: torch.Size, pieces: tuple[WeightSlice, ...], value: torch.Tensor) -> torch.Tensor:
    """Gather the slices of one parameter.

    Args:
        group: name of the process group; empty for this rank alone.
        shape: of the whole.
        pieces: what of it this rank holds; other ranks hold other positions.
        value: this rank's slice.

    Returns:
        The whole, on the device of ``value``.

    Raises:
        AgreementError: when a peer fails or does not answer in time.
    """
    whole = value.new_empty(shape)
    if not group:
        place(whole, pieces, value)
        return whole
    ranks = process_group(group)
    held: list[Any] = [None] * ranks.size()
    with answering(ranks, "gathering weights"):
        dist.all_gather_object(held, (pieces, tuple(value.shape)), group=ranks)
        for index, (theirs, size) in enumerate(held):
            part = value.contiguous() if index == ranks.rank() else value.new_empty(size)
            part = part.to(carrier(value.device, ranks))
            if part.numel():
                dist.broadcast(part, group=ranks, group_src=index)
                place(whole, theirs, part.to(value.device))
    return whole
