"""Stands before what runs a denoiser: calls from a strand wait there until their turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from xdit_compile.capture.state.in_place import held
from xdit_compile.runtime.diffusers_pipeline import denoisers
from xdit_compile.runtime.runner import Runner

from .strands import CURRENT
from .traffic import Traffic


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call of a denoiser that waits for its turn.

    Args:
        gate: where.
        args, kwargs: what the denoiser was given.
    """

    gate: Gate
    args: tuple
    kwargs: dict[str, Any]


class Gate:
    """Called in the place of a runner, which it holds.

    Args:
        name: of the denoiser.
        runner: what runs its calls.

    Attributes:
        traffic: what they send to other ranks.
    """

    def __init__(self, name: str, runner: Runner):
        self.name, self.runner = name, runner
        self.session, self.module = runner.session, runner.module
        self.traffic = Traffic(runner.mesh)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        strand = CURRENT.strand
        if strand is None:
            return self.run(*args, **kwargs)
        answer = strand.ask(Call(self, args, kwargs))
        return self.run(*args, **kwargs) if answer is GO_ON else answer

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The denoiser's result, at once."""
        result = self.runner(*args, **kwargs)
        self.traffic.ran(self.runner.calls.latest)
        return result


GO_ON = object()
"""The answer to a call that its own thread is to make."""


def put_gates(pipe: Any) -> list[Gate]:
    """Put a gate before every denoiser of a parallelized pipeline."""
    return [gate for name, module in denoisers(pipe) if (gate := _put(name, module)) is not None]


def take_off(gates: Sequence[Gate]) -> None:
    """Put the runners back in the place of their gates."""
    for gate in gates:
        held(gate.module)["forward"] = gate.runner


def _put(name: str, module: nn.Module) -> Gate | None:
    methods = held(module)
    runner = methods.get("forward")
    if not isinstance(runner, Runner):
        return None
    methods["forward"] = gate = Gate(name, runner)
    return gate
