"""Short digests of what ranks must have in common."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import torch

from .program import Program

_DEVICE = re.compile(r"\b([a-z]+):\d+\b")
"""A device with its index as graphs print it; they print nothing else so."""

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None))
"""Leaves whose text says all that counts."""


def digest(parts: Iterable[Any]) -> str:
    """A digest of the text of some parts, the same in every process."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def digest_tensors(leaves: Iterable[Any]) -> str:
    """A digest of values: tensors by their bytes, other leaves by their text."""
    state = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
            state.update(str((leaf.dtype, tuple(leaf.shape))).encode())
            flat = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            plain = flat.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
            state.update(plain.view(torch.uint8).numpy().tobytes())
        elif isinstance(leaf, PLAIN):
            state.update(repr(leaf).encode())
    return state.hexdigest()[:16]


def digest_shapes(leaves: Iterable[Any]) -> str:
    """A digest of shapes and dtypes."""
    return digest((tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, torch.Tensor))


def digest_program(program: Program) -> str:
    """A digest of a captured program's graphs; constants count by shape, devices by kind, as each rank has its own."""
    texts = [str(program.root.graph)]
    texts += [f"{name} {structure.graph}" for name, structure in sorted(program.structures().items())]
    return digest(_DEVICE.sub(r"\1", text) for text in texts)
