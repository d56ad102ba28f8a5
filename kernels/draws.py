"""Random numbers as an op of the graph: drawn whole on every rank, in the order and from the states of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from xdit_compile.distributed.devices import default_generator
from xdit_compile.errors import AgreementError

from .collectives.registration import register_ordered

DEFAULT = -1
"""Stands for the default generator of the device that numbers are drawn on."""
SOURCES: dict[str, Callable[..., torch.Tensor]] = {"randn": torch.randn, "rand": torch.rand}
"""What can be drawn, by name."""


class Draws:
    """What one call draws. However often the call is computed, each number is drawn once.

    Args:
        generators: those that the call was given, in order.
        share: called with a state before the first number is drawn from it; says which state counts on all ranks.
    """

    def __init__(self, generators: Sequence[torch.Generator], share: Callable[[torch.Tensor], torch.Tensor]):
        self._given, self._share = tuple(generators), share
        self._copies: dict[torch.Generator, torch.Generator] = {}
        self._drawn: list[torch.Tensor] = []

    def take(
        self, source: str, size: Sequence[int], position: int, which: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """The numbers at a position in the order of the call, drawn if they were not before.

        Raises:
            AgreementError: earlier ones were not drawn yet, or others were drawn there.
        """
        if position == len(self._drawn):
            generator = self._copy(default_generator(device) if which == DEFAULT else self._given[which])
            self._drawn.append(SOURCES[source](size, generator=generator, dtype=dtype, device=device))
        if position >= len(self._drawn) or list(self._drawn[position].shape) != list(size):
            raise AgreementError(f"random numbers of {list(size)} are asked for out of order; please report this model")
        return self._drawn[position].clone()

    def settle(self) -> None:
        """Leave the generators as one process would."""
        for generator, copy in self._copies.items():
            generator.set_state(copy.get_state())

    def _copy(self, generator: torch.Generator) -> torch.Generator:
        if generator not in self._copies:
            self._copies[generator] = torch.Generator(generator.device)
            self._copies[generator].set_state(self._share(generator.get_state()))
        return self._copies[generator]


DRAWS: ContextVar[Draws | None] = ContextVar("xdit_compile_draws", default=None)
"""What the call that runs in this thread draws."""


@contextmanager
def drawing(draws: Draws) -> Iterator[None]:
    """Have `draw` draw from the generators of a call, which are moved on when it ends."""
    token = DRAWS.set(draws)
    try:
        yield
        draws.settle()
    finally:
        DRAWS.reset(token)


def _fake(
    source: str, size: list[int], position: int, generator: int, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device=device)


@register_ordered(
    "draw(str source, SymInt[] size, int position, int generator, *, ScalarType dtype, Device device) -> Tensor",
    _fake,
    tags=(torch.Tag.nondeterministic_seeded,),
)
def draw(
    source: str, size: list[int], position: int, generator: int, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The whole of what one process draws at ``position`` of a call.

    Args:
        source: a name of ``SOURCES``.
        size: the shape.
        position: how many times the call drew before.
        generator: which of the generators that the call was given; `DEFAULT` for the device's own.

    Raises:
        AgreementError: outside of `drawing`, or in another order.
    """
    if device.type == "meta":
        return torch.empty(size, dtype=dtype, device=device)
    draws = DRAWS.get()
    if draws is None:
        raise AgreementError("a graph that draws random numbers runs only in a call of its module")
    return draws.take(source, size, position, generator, dtype, device)
