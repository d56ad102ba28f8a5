"""What runs the calls of one signature."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from xdit_compile.capture.state.guards import Guards
from xdit_compile.compiler import Analysis
from xdit_compile.ir.program import Program

from .data_parallel import Batch, SharedCall


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledCall:
    """What one signature runs on this rank.

    Args:
        batch: how ranks share its samples; set once it is known.
        room: whether every rank had the memory for the module itself to run beside all else.
    """

    analysis: Analysis
    program: Program
    run: Callable[..., tuple[Any, ...]]
    batch: Batch | None = dataclasses.field(default=None, kw_only=True)
    room: bool = dataclasses.field(default=True, kw_only=True)

    @property
    def shared(self) -> SharedCall | None:
        """The call of which this rank runs a part, where it does."""
        return None if self.batch is None else self.batch.shared

    @property
    def whole(self) -> Program:
        """The captured program of the whole call."""
        return self.analysis.program if self.shared is None else self.shared.whole

    @property
    def made(self) -> list[torch.Tensor]:
        """Fake tensors of the forms of the results of the whole call."""
        (output,) = self.whole.root.graph.find_nodes(op="output")
        return [leaf.meta["val"] for leaf in output.args[0]]

    @property
    def programs(self) -> Sequence[Program]:
        """All that this rank runs."""
        return [self.program]

    @functools.cached_property
    def _guards(self) -> Guards:
        return Guards(self.program.guards if self.shared is None else self.shared.guards)

    def fits(self, leaves: list[Any]) -> bool:
        """Whether the values that the capture baked in are those of this call."""
        return self._guards.fit(leaves)
