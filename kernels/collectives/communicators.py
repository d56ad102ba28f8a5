"""Backends whose waits come back at once, as NCCL's do: which a group has, what they say of themselves, their end.

Such a wait puts the transfer in order with what the device computes, and raises nothing. Gloo's waits block.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from xdit_compile.distributed.mesh import first_sentence

ABORT_SECONDS = 20.0
"""How long communicators that are aborted may take, all together."""

Communicators = dict[str, Any]
"""The backends of a group whose waits come back at once, by the type of device that they move things of."""

logger = logging.getLogger("xdit_compile")


def communicators_of(group: dist.ProcessGroup) -> Communicators:
    """Those of a group; none where it is gloo's."""
    return {kind: backend for kind, backend in _backends(group).items() if backend.name() != dist.Backend.GLOO}


def _backends(group: dist.ProcessGroup) -> dict[str, Any]:
    """By the type of device; a group that is written in Python is its own."""
    kinds = group._device_types
    return {device.type: group._get_backend(device) for device in kinds} if kinds else {"cpu": group}


def state_of(communicators: Communicators) -> str | None:
    """How one of them says that it failed, as by a transfer that took too long; None where none does."""
    for backend in communicators.values():
        try:
            state = backend.get_error().name
        except (AttributeError, RuntimeError):
            continue
        if state != "SUCCESS":
            return state.lower()
    return None


def abort(several: Sequence[Communicators]) -> list[bool]:
    """Abort all at the same time, since one may wait for the device, which works for another.

    Returns:
        For each whether it came to an end in time.
    """
    threads = [threading.Thread(target=_abort, args=(each,), daemon=True) for each in several]
    for thread in threads:
        thread.start()
    end = time.monotonic() + ABORT_SECONDS
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [not thread.is_alive() for thread in threads]


def _abort(communicators: Communicators) -> None:
    for backend in communicators.values():
        try:
            backend.abort()
        except RuntimeError as error:
            logger.warning("a communicator could not be aborted (%s)", first_sentence(error))


def abort_blocking(group: dist.ProcessGroup) -> None:
    """Abort what a group has of gloo beside its communicators, which frees peers that wait for it."""
    for backend in _backends(group).values():
        if backend.name() == dist.Backend.GLOO:
            getattr(backend, "abort", lambda: None)()


def finish_device() -> None:
    """Wait until the device has done all that it was given, transfers among it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
