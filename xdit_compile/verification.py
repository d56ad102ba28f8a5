"""Compares what the partitioned program gives with what the module itself gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .capture import relative_difference
from .errors import VerificationError
from .interpret import assemble, bind
from .program import Program
from .results import tensors_of
from .weights import Weights

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Greatest difference, relative to the greatest value, that another order of summation can explain."""


def verify(found: Any, expected: Any, slack: Callable[[], float] = lambda: 0.0) -> None:
    """Compare two results of the call that a program was made for, tensor by tensor.

    Args:
        slack: asked only where they differ: how much more may be rounding, because the module itself rounds to a
            narrower dtype on its way.

    Raises:
        VerificationError: where they differ by more than rounding; the message says what to do.
    """
    for position, difference, limit in _differences(found, expected, slack):
        raise VerificationError(
            f"output {position} of the split program differs from the unsplit one by {difference:.1e} of its "
            f"greatest value (allowed {limit:.0e}); please report this model, and run it on one rank until then"
        )


def verify_later(found: Any, expected: Any, name: str, slack: Callable[[], float] = lambda: 0.0) -> None:
    """Compare two results of a call for which a program was there already.

    Raises:
        VerificationError: where they differ by more than rounding.
    """
    for position, difference, limit in _differences(found, expected, slack):
        raise VerificationError(
            f"output {position} of {name} was right in the first call and differs in a later one by {difference:.1e} "
            f"of its greatest value (allowed {limit:.0e}): something in it goes by what stands outside of it, as a "
            "count of steps that a pipeline or a function keeps; switch that off, or run it on one rank"
        )


def _differences(found: Any, expected: Any, slack: Callable[[], float]) -> Iterator[tuple[int, float, float]]:
    for position, (one, other) in enumerate(zip(tensors_of(found), tensors_of(expected), strict=True)):
        alike = one.shape == other.shape and one.dtype == other.dtype
        difference = relative_difference(one, other) if alike else float("inf")
        limit = TOLERANCE.get(other.dtype, 0.0)
        if alike and not difference <= limit:
            limit = max(limit, slack())
        if not difference <= limit:
            yield position, difference, limit


@torch.no_grad()
def narrow_rounding(program: Program, module: nn.Module, args: tuple, kwargs: dict) -> float:
    """How far results may move because a program computes in a narrower dtype than it answers in.

    Another order of summation rounds some of the narrow values to the neighbour of what they were. Here all of them
    are, every second one up, and what that does to the results is the most that splitting can do.

    Returns:
        The greatest difference relative to the greatest value; 0 where nothing is narrower than the results.
    """
    tensors = bind(program, Weights(module), pytree.tree_leaves((args, kwargs)))
    exact, moved = (_Moved(program.root, step).run(*tensors) for step in (0, 1))
    pairs = zip(tensors_of(assemble(program, moved)), tensors_of(assemble(program, exact)), strict=True)
    return max((relative_difference(one, other) for one, other in pairs), default=0.0)


class _Moved(fx.Interpreter):
    """Runs a program with values of half the digits moved by so many steps of their last one."""

    def __init__(self, module: fx.GraphModule, step: int):
        super().__init__(module)
        self._step = step

    def run_node(self, node: fx.Node) -> Any:
        found = super().run_node(node)
        if node.op != "call_function" or not isinstance(found, torch.Tensor):
            return found
        return _neighbours(found, self._step) if found.dtype in (torch.float16, torch.bfloat16) else found

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return _Moved(self.fetch_attr(target), self._step).run(*args)


def _neighbours(x: torch.Tensor, step: int) -> torch.Tensor:
    """Every second number up, the others down."""
    signs = torch.ones(x.numel(), device=x.device)
    signs[1::2] = -1
    moved = x.float() * (1 + step * torch.finfo(x.dtype).eps * signs.reshape(x.shape))
    return moved.to(x.dtype)
