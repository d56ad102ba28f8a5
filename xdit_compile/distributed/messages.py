"""Tensors of any dtypes that go to one rank together, as one message of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGNED = 128
"""Every tensor begins at a multiple of so many bytes, as if it had memory of its own: kernels read more than one value
at a time, and views of another dtype begin on whole values."""


def length(likes: Sequence[torch.Tensor]) -> int:
    """Bytes of the message of tensors of these shapes and dtypes; 0 where they are all empty."""
    return _starts(likes)[-1]


def pack(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The message of some tensors, ``[length(tensors)]`` bytes on a device.

    A tensor that is the only one and lies there already is not copied: the message is its memory.
    """
    given = [tensor for tensor in tensors if tensor.numel()]
    if len(given) == 1 and _is_plain(given[0]) and given[0].device == device:
        return given[0].reshape(-1).view(torch.uint8)
    message = torch.empty(length(tensors), dtype=torch.uint8, device=device)
    for view, tensor in zip(unpack(message, tensors), tensors, strict=True):
        view.copy_(tensor)
    return message


def unpack(message: torch.Tensor, likes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Contiguous views of a message, of these shapes and dtypes."""
    starts = _starts(likes)
    return tuple(
        message.narrow(0, start, like.numel() * like.element_size()).view(like.dtype).view(like.shape)
        for start, like in zip(starts, likes, strict=False)
    )


def _starts(likes: Sequence[torch.Tensor]) -> list[int]:
    """Where each tensor begins, and last where the message ends; empty ones take no room."""
    starts, end = [], 0
    for like in likes:
        start = -(-end // ALIGNED) * ALIGNED if like.numel() else 0
        starts.append(start)
        end = max(end, start + like.numel() * like.element_size())
    return [*starts, end]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is its values in order."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
