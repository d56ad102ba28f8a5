"""What one signature runs on this rank where calls keep something from step to step."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch

from xdit_compile.runtime.compiled_call import CompiledCall
from xdit_compile.runtime.generation import States


@dataclasses.dataclass(frozen=True, eq=False)
class SteppedCall(CompiledCall, abc.ABC):
    """A call of which every branch of guidance has states of its own."""

    @property
    @abc.abstractmethod
    def stepping(self) -> Collection[int]:
        """Positions among the flat inputs of those that may change from step to step."""

    @property
    @abc.abstractmethod
    def kept(self) -> Mapping[str | int, torch.Tensor]:
        """What its programs keep, by name, as tensors of those shapes and dtypes on the meta device."""

    def constants(self, leaves: list[Any]) -> list[torch.Tensor]:
        """The inputs that tell branches of guidance apart: neither the time of a step nor what changes with it."""
        tensors = [(position, leaf) for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        return [leaf for position, leaf in tensors if leaf.ndim > 1 and position not in self.stepping]

    def states(self, device: torch.device) -> States:
        """Empty states of the kinds that the programs keep, and nothing on its way for them."""
        return {name: torch.zeros(like.shape, dtype=like.dtype, device=device) for name, like in self.kept.items()}
