"""What runs the calls of one signature."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xdit_compile.capture.state.guards import Guards
from xdit_compile.compiler import Analysis
from xdit_compile.ir.program import Program

from .data_parallel import Batch, SharedCall
from .stored.pending import Pending
from .stored.shelf import Ticket
from .stored.stored_call import StoredCall

Run = Callable[..., tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledCall:
    """What one signature runs on this rank.

    Args:
        analysed: what the passes found that are the same on every rank. Of a call that was kept nothing is known but
            what its programs are, and this captures it anew.
        batch: how ranks share its samples; set once it is known.
        room: whether every rank had the memory for the module itself to run beside all else.
        stored: what was kept of the call, where another process made it.
        ticket: what it is kept under.
        pending: what is compiled in the background, while programs run op by op.
        said: how long it took to be ready, and where its graphs came from.
    """

    analysed: Callable[[], Analysis]
    program: Program
    run: Run
    batch: Batch | None = dataclasses.field(default=None, kw_only=True)
    room: bool = dataclasses.field(default=True, kw_only=True)
    stored: StoredCall | None = dataclasses.field(default=None, kw_only=True)
    ticket: Ticket | None = dataclasses.field(default=None, kw_only=True)
    pending: Pending | None = dataclasses.field(default=None, kw_only=True)
    said: str = dataclasses.field(default="", kw_only=True)

    @functools.cached_property
    def analysis(self) -> Analysis:
        """What the passes found that are the same on every rank."""
        return self.analysed()

    @property
    def shared(self) -> SharedCall | None:
        """The call of which this rank runs a part, where it does."""
        return None if self.batch is None else self.batch.shared

    @property
    def whole(self) -> Program:
        """A program that takes what the whole call takes, and says what comes of it."""
        if self.shared is not None:
            return self.shared.whole
        return self.analysis.program if self.stored is None else self.program

    @property
    def captured(self) -> Program:
        """The captured program of the whole call."""
        return self.analysis.program if self.shared is None else self.shared.whole

    @property
    def made(self) -> list[torch.Tensor]:
        """Fake tensors of the forms of the results of the whole call."""
        if self.stored is not None:
            return [torch.empty(form.shape, dtype=form.dtype, device="meta") for form in self.stored.results]
        (output,) = self.whole.root.graph.find_nodes(op="output")
        return [leaf.meta["val"] for leaf in output.args[0]]

    @property
    def programs(self) -> Sequence[Program]:
        """All that this rank runs."""
        return [program for program, _ in self.parts.values()]

    @property
    def parts(self) -> Mapping[str, tuple[Program, Run]]:
        """The programs by name, each with what computes it."""
        return {"call": (self.program, self.run)}

    @property
    def facts(self) -> dict[str, Any]:
        """What else it takes to make this again of its programs, in values that plain data can say."""
        return {}

    @property
    def over(self) -> str:
        """Which ranks share the batch."""
        return "" if self.batch is None else self.batch.over

    @property
    def unshared(self) -> tuple[Any, ...] | None:
        """Why other ranks do not share it, and how many samples it has; None where they do."""
        reason = None if self.batch is None else self.batch.unshared
        return None if reason is None else (reason.why, reason.samples)

    @functools.cached_property
    def _guards(self) -> Guards:
        return Guards(self.program.guards if self.shared is None else self.shared.guards)

    def fits(self, leaves: list[Any]) -> bool:
        """Whether the values that the capture baked in are those of this call."""
        return self._guards.fit(leaves)
