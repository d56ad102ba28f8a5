"""Tensors that lie one below the other in one piece of memory, so that all of them are one tensor as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor, and what gives whoever holds it the same values in another place."""

    value: torch.Tensor
    put: Callable[[torch.Tensor], None]


class Joiner:
    """Lays tensors one below the other, and knows which memory it laid them in."""

    def __init__(self) -> None:
        self._made: dict[int, StorageWeakRef] = {}

    def joined(self, parts: Sequence[Part]) -> torch.Tensor:
        """All parts as one tensor, along the first dim.

        Where they do not lie one below the other they are laid so: each is then a view of the joined tensor, which
        holds what is written to any of them, and no byte is held twice. What moves one away has all of them laid anew
        when they are joined next. A tensor that shares its memory with others stays where it is, and the joined one is
        a copy.

        Args:
            parts: of one dtype and device; all dims but the first are equal.
        """
        values = [each.value for each in parts]
        shape = (sum(len(value) for value in values), *values[0].shape[1:])
        with torch.inference_mode(False), torch.no_grad():
            if _follow(values):
                return values[0].detach().as_strided(shape, _strides(shape))
            together = torch.cat([value.detach() for value in values])
            if all(map(self._movable, values)):
                self._note(together)
                for put, rows in zip((each.put for each in parts), together.split(list(map(len, values))), strict=True):
                    put(rows)
        return together

    def _movable(self, value: torch.Tensor) -> bool:
        """Whether nobody else looks into the memory of a tensor, but for those that were laid there."""
        storage = value.untyped_storage()
        return storage.nbytes() == value.numel() * value.element_size() or storage._cdata in self._made

    def _note(self, together: torch.Tensor) -> None:
        self._made = {key: kept for key, kept in self._made.items() if not kept.expired()}
        storage = together.untyped_storage()
        self._made[storage._cdata] = StorageWeakRef(storage)


def _follow(values: Sequence[torch.Tensor]) -> bool:
    """Whether every tensor begins where the one before ends, in the same piece of memory."""
    storage = values[0].untyped_storage().data_ptr()
    end = values[0].storage_offset()
    for value in values:
        if not value.is_contiguous() or value.untyped_storage().data_ptr() != storage or value.storage_offset() != end:
            return False
        end += value.numel()
    return True


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
