"""Compares what the partitioned program gives with what the module itself gives."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from xdit_compile.capture.capture import relative_difference
from xdit_compile.capture.interpret import assemble, bind
from xdit_compile.capture.state.module_snapshot import same_random_numbers
from xdit_compile.errors import VerificationError
from xdit_compile.ir.peak_memory import if_room
from xdit_compile.ir.program import Program
from xdit_compile.ir.results import tensors_of
from xdit_compile.weights.weights import Weights

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Greatest difference, relative to the greatest value, that another order of summation can explain."""
ROWS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The same for the root mean square of the difference in a row, relative to that of the row or, where that is more, of
all values. The most that splits by tokens, heads, batch and rows made of it in two dozen tiny models and autoencoders:
3.5e-2 in bfloat16, 3.4e-3 in float16, 1.2e-6 in float32; without autoencoders 2.1e-2 and 2.6e-3 in the first two."""
SUMS = re.compile("mm|mv|dot|linear|conv|attention|norm|softmax|mean|sum|var|std|pool|kept_module")
"""Names of operators that add several values up."""
CASTS = re.compile("_to_copy|convert_element_type")
"""Names of operators that change the dtype of a value."""
HALVES = (torch.float16, torch.bfloat16)
NOISE = 8
"""Last digits of the greatest value by which another order of summation moves a sum; seen were up to 4."""
LEAST_IN_ROW = 16
"""Rows of fewer values are too few for a mean."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one tensor lies from another; a row is what has one position along one dim.

    Args:
        greatest: the greatest difference relative to the greatest value.
        row: root mean square of the difference in the row where it is worst, relative to that of the row's values or,
            where that is more, of all.
        where: dim and position of that row.
    """

    greatest: float = 0.0
    row: float = 0.0
    where: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, one: torch.Tensor, other: torch.Tensor) -> Difference:
        """That of ``one`` from ``other``, which are of one shape; equal infinities and NaNs agree."""
        return cls(relative_difference(one, other), *_worst_row(one, other))

    def within(self, limit: Difference) -> bool:
        """Whether it is no more than another in both respects."""
        return self.greatest <= limit.greatest and self.row <= limit.row

    def or_more(self, other: Difference) -> Difference:
        """The greater of two in each respect."""
        return Difference(max(self.greatest, other.greatest), max(self.row, other.row))

    def told(self, limit: Difference) -> str:
        """What is beyond a limit, in words."""
        if not self.greatest <= limit.greatest:
            return f"{self.greatest:.1e} of its greatest value (allowed {limit.greatest:.0e})"
        dim, position = self.where
        return (
            f"{self.row:.1e} of its values' root mean square at position {position} of dim {dim} "
            f"(allowed {limit.row:.0e})"
        )


def _worst_row(one: torch.Tensor, other: torch.Tensor) -> tuple[float, tuple[int, int]]:
    wide = torch.complex128 if other.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    same = (one == other) | (one.isnan() & other.isnan())
    squares = torch.where(same, 0, one - other).abs().square()
    expected = torch.where(other.isfinite(), other, 0).abs().square()
    worst, where = 0.0, (0, 0)
    for dim, size in enumerate(other.shape):
        if size < 2 or other.numel() < LEAST_IN_ROW * size or not (whole := expected.mean()):
            continue
        others = [each for each in range(other.dim()) if each != dim]
        shares = squares.mean(others) / expected.mean(others).clamp(min=whole.item())
        share, at = (found.item() for found in shares.max(0))
        if not share <= worst:
            worst, where = share, (dim, int(at))
    return math.sqrt(worst), where


Slack = Callable[[], Difference]


def verify(actual: Any, expected: Any, slack: Slack = Difference) -> None:
    """Compare two results of the call that a program was made for, tensor by tensor.

    Args:
        slack: asked only where they differ: how much more may be rounding, because the module itself rounds to a
            narrower dtype on its way.

    Raises:
        VerificationError: where they differ by more than rounding; the message says what to do.
    """
    for position, told in _differences(actual, expected, slack):
        raise VerificationError(
            f"output {position} of the split program differs from the unsplit one by {told}; please report this model, "
            "and run it on one rank until then"
        )


def verify_later(actual: Any, expected: Any, name: str, slack: Slack = Difference) -> None:
    """Compare two results of a call for which a program was there already.

    Raises:
        VerificationError: where they differ by more than rounding.
    """
    for position, told in _differences(actual, expected, slack):
        raise VerificationError(
            f"output {position} of {name} was right in the first call and differs in a later one by {told}: something "
            "in it goes by what stands outside of it, as a count of steps that a pipeline or a function keeps; switch "
            "that off, or run it on one rank"
        )


def _differences(actual: Any, expected: Any, slack: Slack) -> Iterator[tuple[int, str]]:
    for position, (one, other) in enumerate(zip(tensors_of(actual), tensors_of(expected), strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            kinds = [f"{str(each.dtype).removeprefix('torch.')}{tuple(each.shape)}" for each in (one, other)]
            yield position, f"its form, {kinds[0]} and not {kinds[1]}"
            continue
        measured = functools.partial(Difference.of, one, other)
        difference = if_room(measured, other.device) or Difference.of(one.cpu(), other.cpu())
        limit = Difference(TOLERANCE.get(other.dtype, 0.0), ROWS.get(other.dtype, 0.0))
        if not difference.within(limit):
            limit = limit.or_more(slack())
        if not difference.within(limit):
            yield position, difference.told(limit)


@torch.no_grad()
def narrow_rounding(program: Program, module: nn.Module, args: tuple, kwargs: dict) -> Difference:
    """How far results may move because a program computes in a narrower dtype than float32.

    Another order of summation rounds some of the sums to a neighbour of what they were. Here two of three are moved, up
    or down by chance: more than splitting does. What is no sum, such as a time step times 1000, stays as it is. A wider
    number that is cast, such as a rotated query, rounds the other way where it lies as near to the middle of two as
    another order of summation could have put it.

    Returns:
        The greatest difference of any result; nothing where no value has half the digits.
    """
    tensors = bind(program, Weights(module), pytree.tree_leaves((args, kwargs)))
    with same_random_numbers():
        torch.manual_seed(0)
        exact, moved = (_Moved(program.root, step).run(*tensors) for step in (0, 1))
    pairs = zip(tensors_of(assemble(program, moved)), tensors_of(assemble(program, exact)), strict=True)
    return functools.reduce(Difference.or_more, (Difference.of(one, other) for one, other in pairs), Difference())


class _Moved(fx.Interpreter):
    """Runs a program with sums of half the digits moved by so many steps of their last one."""

    def __init__(self, module: fx.GraphModule, step: int):
        super().__init__(module)
        self._step = step

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if not self._step or node.op != "call_function":
            return result
        if CASTS.search(str(node.target)):
            return _tipped(self.env[node.all_input_nodes[0]], result)
        return pytree.tree_map_only(torch.Tensor, _neighbours, result) if SUMS.search(str(node.target)) else result

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return _Moved(self.fetch_attr(target), self._step).run(*args)


def _neighbours(x: torch.Tensor) -> torch.Tensor:
    """Each number, the next above or the next below, by chance; where it has more digits it stays."""
    if x.dtype not in HALVES:
        return x
    steps = torch.randint(-1, 2, x.shape, dtype=x.dtype, device=x.device)
    return torch.addcmul(x, x, steps, value=0.55 * torch.finfo(x.dtype).eps)


def _tipped(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """Numbers that were cast, those near the middle of two rounded the other way."""
    if narrow.dtype not in HALVES or wide.dtype not in (torch.float32, torch.float64) or not wide.numel():
        return narrow
    noise = NOISE * torch.finfo(wide.dtype).eps * wide.abs().max()
    above, below = ((wide + sign * noise).to(narrow.dtype) for sign in (1, -1))
    return torch.where(above == narrow, below, above)
