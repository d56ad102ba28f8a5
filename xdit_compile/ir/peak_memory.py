"""Counts the memory of what a computation makes, without doing it where its tensors are on the meta device."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_compile.plan.host import available_memory

WORKSPACE = 64 * 2**20
"""Bytes that libraries of an accelerator take for themselves, whatever they compute."""
SCATTERED = 8
"""One part of so many of an accelerator's memory lies in gaps that its allocator cannot hand out."""


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
        input_keys = {self._key(leaf) for leaf in pytree.arg_tree_leaves(*args, **(kwargs or {})) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if _is_tensor(leaf) and (key := self._key(leaf)) not in self._known and key not in input_keys:
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


def with_reserve(count: int, device: torch.device) -> int:
    """How much of a device's memory it takes to hold so many bytes of tensors.

    An accelerator's libraries have workspaces, and its allocator hands blocks out in sizes of its own and keeps gaps.
    """
    return count if device.type in ("cpu", "meta") else count + count // SCATTERED + WORKSPACE


def free_bytes(device: torch.device) -> int | None:
    """Bytes of a device that this process may still take, what its allocator keeps unused among them.

    None where nobody says.
    """
    if device.type == "meta":
        return None
    if device.type == "cpu":
        return available_memory(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    try:
        unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return _memory_info(device)[0] + max(unused, 0)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return None


def _memory_info(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of an accelerator."""
    asked = getattr(torch.accelerator, "get_memory_info", None) or getattr(torch, device.type).mem_get_info
    return asked(device)


def release_unused(device: torch.device) -> None:
    """Have an accelerator's allocator give back what it keeps unused: its gaps are in the way of other sizes."""
    if device.type not in ("cpu", "meta") and torch.accelerator.is_available():
        with suppress(RuntimeError):  # a device without an allocator of PyTorch's keeps nothing
            torch.accelerator.empty_cache()


def if_room(run: Callable[[], Any], device: torch.device) -> Any:
    """What a computation gives; None where there is no memory for it."""
    try:
        return run()
    except Exception as error:
        if not ran_out(error):
            raise
    release_unused(device)
    return None


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory; the allocator of CPUs and libraries have no class for it."""
    words = ("DefaultCPUAllocator: ", "_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)
