"""What a rule may ask where it calls its operator on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import fx

from .windows import HaloWindow


class LocalCall(Protocol):
    """The call of one operator on one rank.

    ``seen`` has the rows of the first operand that this rank sees, for each of its dims that are read by windows.
    """

    node: fx.Node
    seen: Mapping[int, HaloWindow]

    @property
    def aten(self) -> torch._ops._OpNamespace: ...

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call in this rank's graph."""

    def same(self, **changed: Any) -> fx.Node:
        """The node's own call with its operands on this rank, and some keyword arguments changed."""

    def as_captured(self) -> fx.Node:
        """The node's own call on operands that lie in memory as they did when it was captured."""

    def constant(self, value: torch.Tensor) -> fx.Node:
        """A tensor that belongs to this rank's graph."""

    def take(self, node: fx.Node, dim: int, positions: np.ndarray, size: int) -> fx.Node:
        """``positions`` of a dim that has ``size`` of them on this rank, in the given order."""

    def operand(self, operand: int) -> fx.Node:
        """An operand on this rank."""

    def operand_sizes(self, operand: int) -> list[int]:
        """The shape of an operand on this rank."""

    def out_sizes(self, result: int) -> list[int]:
        """The shape of a result on this rank."""

    def length(self, handle: int | None, operand: int, dim: int) -> int:
        """How many positions this rank has of an axis that is split as ``dim`` of an operand is; 0 for no axis.

        Args:
            handle: what `Rule.keep` answered when it was given the axis.
        """


Emit = Callable[[LocalCall], fx.Node]
