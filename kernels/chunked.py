"""Attention by chunks of queries and keys: memory grows with their number, and not with its square."""

from __future__ import annotations

import math

import torch

from .reference import accumulation_dtype, additive, repeat_heads

QUERIES, KEYS = 256, 1024
"""Of one chunk: the scores of a head take 1 MiB."""


def chunked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``attention_reference`` gives, as Rabe and Staats compute it (arXiv:2112.05682), on any device.

    Args:
        q: ``[B, Hq, Sq, D]``.
        k: ``[B, Hkv, Sk, D]``; ``Hq`` is a multiple of ``Hkv``.
        v: ``[B, Hkv, Sk, Dv]``.
        mask: bool or additive, of four dims, each 1 or full.
        is_causal: query ``i`` sees keys ``0..i`` only.
        scale: of the scores.

    Returns:
        ``[B, Hq, Sq, Dv]`` in the dtype of ``q``, and the log-sum-exp ``[B, Hq, Sq]`` in fp32 (fp64 for fp64 inputs).
    """
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    for first in range(0, q.shape[2], QUERIES):
        rows = slice(first, first + QUERIES)
        seen = None if mask is None else _part(mask, 2, rows)
        diagonal = first if is_causal else None
        out[:, :, rows], lse[:, :, rows] = _rows(q[:, :, rows], k, v, seen, diagonal, scale)
    return out, lse


def _rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, diagonal: int | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one chunk of queries, chunk after chunk of the keys.

    Weights are taken relative to the greatest score so far, so that what there is shrinks whenever a greater one comes.
    Merged by log-sum-exp, chunks would lose their share where a mask has one large negative number for every key.
    """
    exact = accumulation_dtype(q.dtype)
    q = q.to(exact)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    total = q.new_zeros(*q.shape[:3], 1)
    top = torch.full_like(total, -math.inf)
    end = k.shape[2] if diagonal is None else min(k.shape[2], diagonal + q.shape[2])
    for first in range(0, end, KEYS):
        columns = slice(first, min(first + KEYS, end))
        keys, values = (repeat_heads(x[:, :, columns].to(exact), q.shape[1]) for x in (k, v))
        scores = (q @ keys.transpose(-2, -1)).mul_(scale)
        if diagonal is not None:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(diagonal - first + 1)
            scores.masked_fill_(later, -math.inf)
        if mask is not None:
            scores += additive(_part(mask, 3, columns), exact)
        before, top = top, torch.maximum(top, scores.amax(-1, keepdim=True))
        base = top.masked_fill(top == -math.inf, 0)
        weights, kept = scores.sub_(base).exp_(), (before - base).exp_()
        total = total * kept + weights.sum(-1, keepdim=True)
        out = out * kept + weights @ values
    return out / total.clamp_min(torch.finfo(exact).tiny), (top + total.log()).squeeze(-1)


def _part(mask: torch.Tensor, dim: int, chunk: slice) -> torch.Tensor:
    """The part of a mask for a chunk along a dim, which may be 1."""
    if mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, chunk.start, min(chunk.stop, mask.shape[dim]) - chunk.start)
