"""Attention over parts of the keys, joined to attention over all of them by log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .reference import accumulation_dtype

Part = tuple[torch.Tensor, torch.Tensor]


def merge(parts: Sequence[Part]) -> Part:
    """Join attention results over disjoint sets of keys, as in Ring Attention (arXiv:2310.01889).

    Args:
        parts: ``(out [..., S, D], lse [..., S])`` each; a row that saw no key has an ``lse`` of -inf and weight 0.

    Returns:
        ``(out, lse)`` over all keys, in fp32 (fp64 where the outputs are). A row that saw no key in any part is 0 with
        an ``lse`` of -inf.

    Raises:
        ValueError: without parts.
    """
    if not parts:
        raise ValueError("merge needs at least one part")
    exact = accumulation_dtype(parts[0][0].dtype)
    logs = torch.stack([lse.to(exact) for _, lse in parts])
    top = logs.amax(0)
    weights = torch.exp(logs - torch.where(top == -math.inf, 0.0, top))
    total = weights.sum(0)
    shares = weights / torch.where(total == 0, 1.0, total)
    out = parts[0][0].to(exact) * shares[0].unsqueeze(-1)
    for (part, _), share in zip(parts[1:], shares[1:], strict=True):
        out = torch.addcmul(out, part.to(exact), share.unsqueeze(-1))
    return out, top + torch.log(total)
