"""What attention is: the plain PyTorch definition that every provider is checked against."""

from __future__ import annotations

import math

import torch


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its formula, in fp32 (fp64 for fp64 inputs), with the log-sum-exp of the scores.

    A row that may see no key gives 0 with a log-sum-exp of -inf, as ``F.scaled_dot_product_attention`` does.

    Args:
        q: ``[..., Hq, Sq, D]``.
        k: ``[..., Hkv, Sk, D]``; leading dims broadcast with those of ``q``.
        v: ``[..., Hkv, Sk, Dv]``.
        mask: bool (True takes part) or additive, broadcastable to ``[..., Hq, Sq, Sk]``.
        is_causal: query ``i`` sees keys ``0..i`` only.
        scale: of the scores, ``1 / sqrt(D)`` by default.
        enable_gqa: ``Hq`` is a multiple of ``Hkv`` and consecutive query heads share a key head (arXiv:2305.13245).

    Returns:
        ``[..., Hq, Sq, Dv]`` and ``[..., Hq, Sq]``.
    """
    exact = accumulation_dtype(q.dtype)
    if enable_gqa:
        k, v = repeat_heads(k, q.shape[-3]), repeat_heads(v, q.shape[-3])
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (q.to(exact) @ k.to(exact).transpose(-2, -1)) * scale
    if is_causal:
        scores = scores + additive(causal_mask(q.shape[-2], k.shape[-2], q.device), exact)
    if mask is not None:
        scores = scores + additive(mask, exact)
    lse = torch.logsumexp(scores, -1) if k.shape[-2] else scores.new_full(scores.shape[:-1], -math.inf)
    weights = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1))
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(exact).tiny)
    return weights @ v.to(exact), lse


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as numbers to add to the scores: a bool mask's False becomes -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """``[queries, keys]`` bool, True where the key stands no later than the query; both count from 0."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Key or value heads, each repeated for the consecutive query heads that share it.

    Raises:
        ValueError: when ``heads`` is not a multiple of the heads of ``x``.
    """
    held = x.shape[-3]
    if held == heads:
        return x
    if held == 0 or heads % held:
        raise ValueError(f"{heads} query heads cannot share {held} key heads evenly")
    return x.repeat_interleave(heads // held, -3)
