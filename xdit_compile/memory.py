"""Counts the memory of what a computation makes, without doing it where its tensors are on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """Follows every storage that operators make from its first tensor to its last.

    ``peak`` is the greatest number of bytes alive at one time, ``live`` what is alive now. What was there before, such
    as weights and inputs, does not count; neither does what kernels allocate for themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(leaf) for leaf in pytree.arg_tree_leaves(*args, **(kwargs or {})) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if _is_tensor(leaf) and (key := self._key(leaf)) not in self._known and key not in given:
                self._follow(leaf.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._ended, key, size)

    def _ended(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def peak_bytes(run: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """The greatest number of bytes that what ``run`` makes takes at one time, its result included."""
    with LiveStorages() as storages:
        run(*args, **kwargs)
    return storages.peak
