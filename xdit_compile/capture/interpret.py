"""Running a captured program node by node on real tensors: what every other way of running is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from xdit_compile.capture.state.containers import Outcome
from xdit_compile.ir.program import Input, Program
from xdit_compile.weights.weights import Weights


def bind(
    program: Program, weights: Weights, leaves: list[Any], kept: Mapping[str | int, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """The tensors for the program's placeholders, from a module's weights and the flat leaves of ``(args, kwargs)``.

    Of a program that computes one patch ``kept`` has that patch of the leaves, by position, and by name its states,
    what arrives for them, and what another program computed.

    Inputs are made contiguous: a program is captured for contiguous ones.
    """
    bound = weights.bindings.of(program, weights)
    tensors: list[Any] = list(bound.tensors)
    for position, spec in bound.given:
        tensors[position] = _given(spec, leaves, kept)
    return tensors


def _given(spec: Input, leaves: list[Any], kept: Mapping[str | int, torch.Tensor] | None) -> torch.Tensor:
    """What a call gives for a placeholder."""
    if spec.kind == "user":
        return leaves[int(spec.target)].contiguous()
    assert kept is not None
    return kept[spec.target] if spec.kind in ("state", "incoming") else _dense(kept[spec.target])


def _dense(value: torch.Tensor) -> torch.Tensor:
    """A tensor whose strides follow from its shape, along dims of size 1 too: compilers look at them all."""
    strides = torch.empty(value.shape, device="meta").stride()
    return value if value.stride() == strides else value.clone(memory_format=torch.contiguous_format)


def assemble(program: Program, tensors: tuple[torch.Tensor, ...]) -> Outcome:
    """What the module's call does, from the tensors of the root's output."""
    return program.outcome.filled(tensors)


@torch.no_grad()
def run_program(program: Program, module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """Interpret a program with the module's weights.

    Args:
        program: what ``capture`` returned for this module.
        args, kwargs: inputs of the captured signature.

    Returns:
        The same container as the module returns.
    """
    return run_outcome(program, module, args, kwargs).result


@torch.no_grad()
def run_outcome(program: Program, module: nn.Module, args: tuple, kwargs: dict) -> Outcome:
    """The same, and what the module leaves in containers that it is given."""
    tensors = bind(program, Weights(module), pytree.tree_leaves((args, kwargs)))
    return assemble(program, fx.Interpreter(program.root).run(*tensors))
