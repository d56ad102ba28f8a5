"""PipeFusion on one process, straight from its definition (arXiv:2405.14430, section 3): explicit stale buffers.

Between attentions a token meets no other. So a patch is computed by running the unmodified module on the whole sample
with every attention replaced by one over buffers: keys and values at the patch's positions are this call's, all others
what the buffers hold. What that gives at other positions is thrown away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Positions = Callable[[int], Sequence[torch.Tensor] | None]
"""From a number of tokens to those of each patch; None where an attention does not hold the picture's tokens."""


class _Buffered(TorchFunctionMode):
    """Attention over buffers, which a patch (or, for None, everything) is written to first."""

    def __init__(self, buffers: dict[int, tuple[torch.Tensor, torch.Tensor]], positions: Positions, patch: int | None):
        super().__init__()
        self.buffers, self.positions, self.patch, self.count = buffers, positions, patch, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False))
        given.update(kwargs or {})
        key, value = given["key"], given["value"]
        held = self.positions(key.shape[-2]) if key.shape[-2] == given["query"].shape[-2] else None
        if held is not None:
            at, self.count = self.count, self.count + 1
            if self.patch is None:
                self.buffers[at] = (key.clone(), value.clone())
            else:
                for buffer, fresh in zip(self.buffers[at], (key, value), strict=True):
                    buffer[..., held[self.patch], :] = fresh[..., held[self.patch], :]
            given["key"], given["value"] = self.buffers[at]
        with torch._C.DisableTorchFunction():
            return F.scaled_dot_product_attention(**given)


@dataclasses.dataclass
class Reference:
    """Called in place of a module's forward.

    Args:
        module: the unmodified denoiser.
        positions: the tokens of each patch, by the number of tokens of an attention.
        result: the positions of each patch in the first result, and the dim along which they lie.
        warmup: calls of each branch that compute everything.
        branch: tells branches of guidance apart by a call's arguments.
    """

    module: nn.Module
    positions: Positions
    result: tuple[Sequence[torch.Tensor], int]
    warmup: int
    branch: Callable[[tuple, dict], Hashable] = lambda args, kwargs: 0

    def __post_init__(self) -> None:
        self.forward = self.module.forward
        self.buffers: dict[Hashable, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
        self.steps: dict[Hashable, int] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        branch = self.branch(args, kwargs)
        buffers = self.buffers.setdefault(branch, {})
        self.steps[branch] = self.steps.get(branch, 0) + 1
        if self.steps[branch] <= self.warmup:
            with _Buffered(buffers, self.positions, None):
                return self.forward(*args, **kwargs)
        held, dim = self.result
        whole = None
        for patch, positions in enumerate(held):
            with _Buffered(buffers, self.positions, patch):
                found = self.forward(*args, **kwargs)
            first = found[0]
            whole = torch.zeros_like(first) if whole is None else whole
            whole.index_copy_(dim, positions, first.index_select(dim, positions))
        return (whole,) if isinstance(found, tuple) else type(found)(sample=whole)
