"""What ranks compare before a request: its arguments and the states of random generators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .agreement import Agreement
from .digest import PLAIN, digest, digest_tensors


def facts_of(arguments: Mapping[str, Any]) -> dict[str, str]:
    """A digest of each argument of a call by its name; of floating tensors shapes alone, as values may be rounded."""
    return {name: digest([_described(leaf) for leaf in _leaves(value)]) for name, value in arguments.items()}


def _leaves(value: Any) -> list[Any]:
    leaves, spec = pytree.tree_flatten(value)
    return [str(spec), *leaves]


def _described(leaf: Any) -> str:
    if isinstance(leaf, torch.Generator):
        return f"generator {digest_tensors([leaf.get_state()])}"
    if isinstance(leaf, torch.Tensor):
        values = "" if leaf.is_floating_point() or leaf.is_complex() else digest_tensors([leaf])
        return f"{leaf.dtype}{tuple(leaf.shape)}{values}"
    if isinstance(leaf, PLAIN):
        return repr(leaf)
    if isinstance(leaf, np.ndarray) or hasattr(leaf, "__array_interface__"):
        array = np.asarray(leaf)
        return f"{array.shape}{array.dtype}{digest([array.tobytes().hex()])}"
    return getattr(leaf, "__qualname__", type(leaf).__qualname__)


def share_random_state(agreement: Agreement) -> None:
    """Set the default generators of all ranks to the state of the first.

    Ranks that draw different latents would compute different pictures, and some pipelines draw from the default
    generators even when they are given one.
    """
    devices = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices.append(torch.cuda.default_generators[torch.cuda.current_device()])
    for generator in devices:
        state = agreement.share(generator.get_state().numpy().tobytes())
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
