"""Attention over parts of the keys, joined to attention over all of them by log-sum-exp."""

from __future__ import annotations

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
    (out, lse), *rest = parts
    exact = accumulation_dtype(out.dtype)
    held = out.to(exact, copy=True), lse.to(exact)
    for part in rest:
        held = merge_into(held, part)
    return held


def merge_into(held: Part, part: Part) -> Part:
    """Join attention over more keys to what there is, in as few kernels as that takes.

    Args:
        held: in fp32 or fp64; its output is written to.
        part: over other keys. A row that saw no key is 0, here and in ``held``.
    """
    out, lse = held
    share = torch.sub(part[1], lse).nan_to_num_(0.0).sigmoid_().to(out.dtype)
    return out.lerp_(part[0].to(out.dtype), share.unsqueeze(-1)), torch.logaddexp(lse, part[1])
