"""What ranks compare before a request: its arguments and the states of random generators."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from xdit_compile.distributed.agreement import Agreement
from xdit_compile.distributed.devices import accelerator, current_generators
from xdit_compile.ir.digest import PLAIN, digest, digest_tensors


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
    """Set the default generators of all ranks to the states of the first.

    Ranks that draw different latents would compute different pictures, and some pipelines draw from the default
    generators even when they are given one. All ranks talk once, whichever of them have an accelerator initialised; a
    rank that has not takes the state when it does.
    """
    generators, here = current_generators(), accelerator()
    own = {kind: generator.get_state().numpy().tobytes() for kind, generator in generators.items()}
    for kind, state in _unpacked(agreement.share(_packed(own))).items():
        if kind in generators:
            generators[kind].set_state(state)
        elif here is not None and kind == here.type:
            torch.get_device_module(kind).set_rng_state(state)


def _packed(states: Mapping[str, bytes]) -> bytes:
    sizes = json.dumps({kind: len(state) for kind, state in states.items()})
    return b"\n".join([sizes.encode(), b"".join(states.values())])


def _unpacked(said: bytes) -> dict[str, torch.Tensor]:
    sizes, _, states = said.partition(b"\n")
    lengths = json.loads(sizes)
    parts = torch.frombuffer(bytearray(states), dtype=torch.uint8).split(list(lengths.values()))
    return {kind: part.clone() for kind, part in zip(lengths, parts, strict=True)}
