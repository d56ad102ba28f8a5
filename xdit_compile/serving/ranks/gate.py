"""Stands before what runs a denoiser: calls from a strand wait there until their turn."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from xdit_compile.capture.state.in_place import held
from xdit_compile.runtime.diffusers_pipeline import denoisers
from xdit_compile.runtime.runner import Runner

from .strands import CURRENT


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
    """

    def __init__(self, name: str, runner: Runner):
        self.name, self.runner = name, runner
        self.session, self.module = runner.session, runner.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        strand = CURRENT.strand
        if strand is None:
            return self.runner(*args, **kwargs)
        answer = strand.ask(Call(self, args, kwargs))
        return self.runner(*args, **kwargs) if answer is GO_ON else answer


GO_ON = object()
"""The answer to a call that its own thread is to make."""


def put_gates(pipe: Any) -> list[Gate]:
    """Put a gate before every denoiser of a parallelized pipeline."""
    return [gate for name, module in denoisers(pipe) if (gate := _put(name, module)) is not None]


def _put(name: str, module: nn.Module) -> Gate | None:
    methods = held(module)
    runner = methods.get("forward")
    if not isinstance(runner, Runner):
        return None
    methods["forward"] = gate = Gate(name, runner)
    return gate
