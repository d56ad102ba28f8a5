"""PipeFusion and DistriFusion on one process, straight from their definitions (arXiv:2405.14430, section 3;
arXiv:2402.19481, section 4): explicit stale buffers.

Between attentions a token meets no other. So a patch is computed by running the unmodified module on the whole sample
with every attention replaced by one over buffers: keys and values at the patch's positions are this call's, all others
what the buffers hold. What that gives at other positions is thrown away.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Positions = Callable[[int], Sequence[torch.Tensor] | None]
"""From a number of tokens to those of each patch; None where an attention does not hold the picture's tokens."""


Space = tuple[Positions, int]
"""From the size of the dim that is so many from the end, along which patches lie, to the positions of each."""


class _Buffered(TorchFunctionMode):
    """Where tokens meet, buffers in place of what other patches give; a patch (for None, all) writes its own first.

    Tokens meet in attention (keys and values are kept), in sums over tokens (each patch's part of the sum is), in
    convolutions (what they slide over is, along the dim that ``space`` says how patches lie on), and in group norms
    (each patch's mean and mean of squares are).
    """

    def __init__(self, buffers: dict[int, Any], positions: Positions, patch: int | None, space: Space | None):
        super().__init__()
        self.buffers, self.positions, self.patch, self.space, self.count = buffers, positions, patch, space, 0
        self.lies: dict[int, tuple[int, Sequence[torch.Tensor]]] = {}

    def leave(self, buffers: dict[int, Any]) -> None:
        """Write into other buffers what this patch has written, and nothing else."""
        assert self.patch is not None
        for at, mine in self.buffers.items():
            if isinstance(mine, dict):
                buffers[at][self.patch] = mine[self.patch]
            else:
                dim, held = self.lies[at]
                buffers[at].index_copy_(dim, held[self.patch], mine.index_select(dim, held[self.patch]))

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(args, kwargs)
        if func is torch.matmul and (held := self.positions(args[0].shape[-1])) is not None:
            return self._sum(*args, held)
        if self.space is not None and func in (torch.conv2d, F.conv2d, F.group_norm):
            positions, back = self.space
            held = positions(args[0].shape[-back])
            if func is F.group_norm and held is not None:
                return self._norm(*args, back=back, held=held, **kwargs)
            if func is not F.group_norm and held is not None and args[1].shape[-back] > args[3][-back]:
                return func(self._kept(args[0], args[0].ndim - back, held), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _norm(
        self, x: torch.Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
        *, back: int, held: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        at, self.count = self.count, self.count + 1
        parts = self.buffers.setdefault(at, {})
        found = [x.index_select(x.ndim - back, positions).reshape(x.shape[0], groups, -1) for positions in held]
        moments = [torch.stack([part.mean(-1), part.square().mean(-1)]) for part in found]
        if self.patch is None:
            parts.update(enumerate(moments))
            return F.group_norm(x, groups, weight, bias, eps)
        mine, before = moments[self.patch], parts[self.patch]
        stale = sum(parts[rank] * (len(positions) / x.shape[-back]) for rank, positions in enumerate(held))
        parts[self.patch] = mine
        mean, squares = stale + mine - before
        variance, local = squares - mean.square(), mine[1] - mine[0].square()
        variance = torch.where(variance < 0, local, variance)
        shape = (x.shape[0], groups, *[1] * (x.ndim - 1))
        flat = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
        result = ((flat - mean.reshape(shape)) / (variance.reshape(shape) + eps).sqrt()).reshape(x.shape)
        column = (-1, *[1] * (x.ndim - 2))
        return result * weight.reshape(column) + bias.reshape(column)

    def _kept(self, fresh: torch.Tensor, dim: int, held: Sequence[torch.Tensor]) -> torch.Tensor:
        at, self.count = self.count, self.count + 1
        self.lies[at] = dim, held
        if self.patch is None:
            self.buffers[at] = fresh.clone()
        else:
            self.buffers[at].index_copy_(dim, held[self.patch], fresh.index_select(dim, held[self.patch]))
        return self.buffers[at]

    def _attention(self, args: tuple, kwargs: dict) -> torch.Tensor:
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
        given.update(kwargs)
        tokens = given["key"].shape[-2]
        held = self.positions(tokens) if tokens == given["query"].shape[-2] else None
        if held is not None:
            for name in ("key", "value"):
                given[name] = self._kept(given[name], given[name].ndim - 2, held)
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(**given)

    def _sum(self, one: torch.Tensor, other: torch.Tensor, held: Sequence[torch.Tensor]) -> torch.Tensor:
        at, self.count = self.count, self.count + 1
        parts = self.buffers.setdefault(at, {})
        for patch, positions in enumerate(held):
            if self.patch in (None, patch):
                parts[patch] = one[..., positions] @ other[..., positions, :]
        return sum(parts[patch] for patch in range(len(held)))


@dataclasses.dataclass
class Reference:
    """Called in place of a module's forward.

    Args:
        module: the unmodified denoiser.
        positions: the tokens of each patch, by the number of tokens of an attention.
        result: of each patch a mask over the first result, true where it is the patch's.
        warmup: calls of each branch that compute everything.
        branch: tells branches of guidance apart by a call's arguments.
        space: how patches lie on the grid that convolutions slide over.
        apart: patches lie on ranks that do not wait for one another (DistriFusion), so that each sees what the others
            left in the step before; else they follow one another (PipeFusion).
    """

    module: nn.Module
    positions: Positions
    result: Sequence[torch.Tensor]
    warmup: int
    branch: Callable[[tuple, dict], Hashable] = lambda args, kwargs: 0
    space: Space | None = None
    apart: bool = False

    def __post_init__(self) -> None:
        self.forward = self.module.forward
        self.buffers: dict[Hashable, dict[int, Any]] = {}
        self.steps: dict[Hashable, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        branch = self.branch(args, kwargs)
        buffers = self.buffers.setdefault(branch, {})
        self.steps[branch] = self.steps.get(branch, 0) + 1
        if self.steps[branch] <= self.warmup:
            with _Buffered(buffers, self.positions, None, self.space):
                return self.forward(*args, **kwargs)
        whole, left = None, copy.deepcopy(buffers)
        for patch, mask in enumerate(self.result):
            with _Buffered(
                copy.deepcopy(left) if self.apart else buffers, self.positions, patch, self.space
            ) as buffered:
                found = self.forward(*args, **kwargs)
            if self.apart:
                buffered.leave(buffers)
            first = found[0]
            whole = torch.where(mask, first, torch.zeros_like(first) if whole is None else whole)
        return (whole,) if isinstance(found, tuple) else type(found)(sample=whole)


def along(positions: Sequence[Sequence[int] | torch.Tensor], size: int, back: int) -> list[torch.Tensor]:
    """Masks of patches that lie along one dim of so many positions, so many from the end."""
    found = []
    for each in positions:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[torch.as_tensor(each)] = True
        found.append(mask.reshape(-1, *[1] * (back - 1)))
    return found


def digest_of(name: str) -> Callable[[tuple, dict], Hashable]:
    """Branches by the sum of one argument, which differs between a prompt and its negative."""
    return lambda args, kwargs: float(kwargs[name].double().sum())


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference, of the greatest expected value."""
    return float((found - expected).abs().max() / expected.abs().max())
