"""What a partitioned graph does beside its arithmetic: gathers, collectives, and who does the work."""

from __future__ import annotations

import dataclasses
from typing import Any

from xdit_compile.passes.axes.infer import Place

STALE = "stale_exchange"
"""The op of what is sent for the next call, while this one goes on."""
HIDDEN = (STALE, "ring_attention")
"""What is under way while its own graph computes: the next keys of a ring travel while a rank attends to those that it
has, and what is sent for the next call does while this one goes on."""


@dataclasses.dataclass(frozen=True)
class Gather:
    """A split tensor that was made whole, why, and the bytes that leave this rank for it in one call."""

    place: Place
    reason: str
    kept: tuple[str, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a local graph; ``hidden`` where the graph goes on computing while it is under way."""

    op: str
    purpose: str
    elements: int
    bytes: int
    hidden: bool = False

    @property
    def exposed(self) -> int:
        """The bytes for which nothing is computed meanwhile."""
        return 0 if self.hidden else self.bytes


@dataclasses.dataclass
class Ledger:
    """Gathers, collectives and floating-point operations of one local structure."""

    gathers: list[Gather] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    flops: float = 0.0
    flops_here: float = 0.0
    flops_replicated: float = 0.0
    largest_activation: int = 0
    keys_values: int = 0

    def work(self, total: float, portion: float, split: tuple[str, ...]) -> None:
        """Count an operator's arithmetic.

        Args:
            total: its floating-point operations on whole tensors.
            portion: what this rank does of them, from 0 to 1.
            split: the mesh dimensions that share it; where there are none every rank does all.
        """
        self.flops += total
        self.flops_here += total * portion
        if not split:
            self.flops_replicated += total

    def hold(self, size: int) -> None:
        """Note a tensor of ``size`` bytes."""
        self.largest_activation = max(self.largest_activation, size)

    def hold_keys(self, size: int) -> None:
        """Note one attention's keys and values of ``size`` bytes together."""
        self.keys_values = max(self.keys_values, size)

    def collective(self, op: str, purpose: str, node: Any, value: Any, local: Any, parts: int) -> int:
        """Count an all-gather or all-reduce.

        Args:
            op: ``all_gather`` or ``all_reduce``.
            purpose: what for, as reports say it.
            value: what this rank brings, of a shape that ``local`` knows.
            parts: number of ranks.

        Returns:
            The bytes that leave this rank.
        """
        numel = 1
        for size in local.sizes(value):
            numel *= size
        elements = numel * (parts - 1) if op == "all_gather" else 2 * numel * (parts - 1) // parts
        return self.sent(op, purpose, elements, value.dtype)

    def sent(self, op: str, purpose: str, elements: int, dtype: Any, hidden: bool = False) -> int:
        """Count a collective for which ``elements`` of ``dtype`` leave this rank; returns their bytes.

        Args:
            hidden: whether anything is computed while it is under way; that of `HIDDEN` is in any case.
        """
        self.collectives.append(Collective(op, purpose, elements, elements * dtype.itemsize, hidden or op in HIDDEN))
        return elements * dtype.itemsize

    def add(self, other: Ledger) -> None:
        """Count another structure's call too."""
        self.gathers += other.gathers
        self.collectives += other.collectives
        self.flops += other.flops
        self.flops_here += other.flops_here
        self.flops_replicated += other.flops_replicated
        self.largest_activation = max(self.largest_activation, other.largest_activation)
        self.keys_values = max(self.keys_values, other.keys_values)
