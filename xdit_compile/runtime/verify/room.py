"""Whether the unsplit module has the memory to run beside all that is on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.capture.capture import capture
from xdit_compile.ir.peak_memory import free_bytes, with_reserve
from xdit_compile.passes.memory.on_meta import peak_of

PLENTY = 4096
"""Room for so many times the bytes of a call's inputs is plenty for any module; less is compared with a count."""

HOLDS = 2
"""A module's own code holds on to values longer than a graph does: up to 1.8 times as many bytes in diffusers'."""


def has_room(
    module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict, device: torch.device
) -> bool:  # fmt: skip
    """Whether a module's call fits into the memory that is free, as far as that can be known without a try.

    Where it is not plain from the sizes of its inputs, the call is traced and what it holds at one time is counted.
    """
    free = free_bytes(device)
    if free is None or with_reserve(PLENTY * _bytes((args, kwargs)), device) <= free:
        return True
    try:
        peak = peak_of(capture(module, args, kwargs, forward=forward, run=False), device)
    except Exception:  # noqa: BLE001 - what cannot be traced without a run is tried
        return True
    return with_reserve(HOLDS * peak, device) <= free


def _bytes(inputs: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
