"""Whether the values that a capture baked in are those of a call, asked once of every tensor that is not written to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from xdit_compile.ir.program import Guard
from xdit_compile.ir.versions import version_of


class Guards:
    """The guards of one program, and what is known of the tensors that came.

    A tensor that came before and was not written to since is known by its identity and version; only another one is
    read, which on an accelerator waits for what is under way there.
    """

    def __init__(self, guards: Sequence[Guard]):
        self._guards = [(guard, WeakTensorKeyDictionary()) for guard in guards]

    def fit(self, leaves: Sequence[Any]) -> bool:
        """Whether the flat inputs of a call have the values."""
        return all(_same(guard, leaves[guard.position], known) for guard, known in self._guards)


def _same(guard: Guard, tensor: torch.Tensor, known: Any) -> bool:
    version = version_of(tensor) if type(tensor) in (torch.Tensor, torch.nn.Parameter) else None
    if version is None:
        return torch.equal(tensor, guard.value)
    seen, answer = known.get(tensor, (None, False))
    if seen != version:
        answer = torch.equal(tensor, guard.value)
        known[tensor] = (version, answer)
    return answer
