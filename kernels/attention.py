"""Attention as an op of the graph: any shape, mask and size, computed by a chosen provider.

Irregular calls are made regular here, once, so that no kernel meets what it cannot take: leading dims are flattened,
empty tensors answered without a kernel, and rows that see no key put right.
"""

from __future__ import annotations

import math

import torch

from .providers import AttentionQuery, Call
from .reference import attention_reference, causal_mask
from .registry import choose

__all__ = ["attention", "attention_lse", "attention_reference", "query_of", "token_major"]

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask=None, bool is_causal=False, float? scale=None, "
    'bool enable_gqa=False, str provider="auto"'
)
for _schema in (f"attention({_ARGUMENTS}) -> Tensor", f"attention_lse({_ARGUMENTS}) -> (Tensor, Tensor)"):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    provider: str = "auto",
) -> torch.Tensor:
    """What ``F.scaled_dot_product_attention`` gives, by the provider of that name.

    Args:
        q: ``[..., Hq, Sq, D]``, at least two-dimensional.
        k: ``[..., Hkv, Sk, D]``; leading dims broadcast with those of ``q``.
        v: ``[..., Hkv, Sk, Dv]``.
        mask: bool (True takes part) or additive, broadcastable to ``[..., Hq, Sq, Sk]``.
        is_causal: query ``i`` sees keys ``0..i`` only.
        scale: of the scores, ``1 / sqrt(D)`` by default.
        enable_gqa: ``Hq`` is a multiple of ``Hkv``.
        provider: a name of ``registry.PROVIDERS`` or ``auto``.

    Returns:
        ``[..., Hq, Sq, Dv]`` in the dtype of ``q``, with tokens before heads in memory; 0 where a row sees no key.

    Raises:
        ValueError: when shapes do not fit.
        ProviderUnavailable: when the provider cannot compute this.
    """
    return token_major(attended(q, k, v, mask, is_causal, scale, enable_gqa, provider, lse=False)[0])


@torch.library.impl(_LIBRARY, "attention_lse", "CompositeExplicitAutograd")
def attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    provider: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attention`` with the log-sum-exp of the scores, fp32 ``[..., Hq, Sq]``, -inf where a row sees no key."""
    out, lse = attended(q, k, v, mask, is_causal, scale, enable_gqa, provider, lse=True)
    assert lse is not None
    return token_major(out), lse.contiguous()


@torch.library.register_fake("xdit_compile::attention", lib=_LIBRARY)
def _(q, k, v, mask=None, is_causal=False, scale=None, enable_gqa=False, provider="auto"):
    return empty_output(q, output_shape(q, k, v, mask, enable_gqa))


@torch.library.register_fake("xdit_compile::attention_lse", lib=_LIBRARY)
def _(q, k, v, mask=None, is_causal=False, scale=None, enable_gqa=False, provider="auto"):
    shape = output_shape(q, k, v, mask, enable_gqa)
    return empty_output(q, shape), q.new_empty(shape[:-1], dtype=torch.float32)


def output_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, enable_gqa: bool
) -> tuple[int, ...]:
    """``[..., Hq, Sq, Dv]``.

    Raises:
        ValueError: when q, k, v and mask do not fit together.
    """
    if min(q.dim(), k.dim(), v.dim()) < 2 or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(f"attention over q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} does not fit")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError("attention needs head dims of at least 1")
    if enable_gqa:
        if min(q.dim(), k.dim(), v.dim()) < 3:
            raise ValueError("attention with enable_gqa needs a dim of heads in q, k and v")
        held = k.shape[-3]
        if v.shape[-3] != held or (q.shape[-3] % held if held else q.shape[-3]):
            raise ValueError(f"{q.shape[-3]} query heads cannot share {held} key and {v.shape[-3]} value heads evenly")
        heads = _broadcast(q.shape[:-3], k.shape[:-3], v.shape[:-3]) + q.shape[-3:-2]
    else:
        heads = _broadcast(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    scores = (*heads, q.shape[-2], k.shape[-2])
    if mask is not None:
        check_mask(mask, scores)
    return (*heads, q.shape[-2], v.shape[-1])


def _broadcast(one: torch.Size, *others: torch.Size) -> torch.Size:
    """What ``torch.broadcast_shapes`` gives, which takes longer than the attention of a few tokens."""
    return one if all(other == one for other in others) else torch.broadcast_shapes(one, *others)


def check_mask(mask: torch.Tensor, scores: tuple[int, ...]) -> None:
    """Refuse a mask that does not broadcast to the shape of the scores.

    Raises:
        ValueError: with both shapes.
    """
    aligned = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.dim() > len(scores) or any(size not in (1, wanted) for size, wanted in aligned):
        raise ValueError(f"attention mask {tuple(mask.shape)} does not broadcast to scores {scores}")


def empty_output(q: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """An output of that shape, laid out as ``token_major`` does."""
    if len(shape) < 3:
        return q.new_empty(shape)
    *batch, heads, tokens, width = shape
    return q.new_empty((*batch, tokens, heads, width)).transpose(-3, -2)


def token_major(x: torch.Tensor) -> torch.Tensor:
    """``[..., heads, tokens, width]``, tokens before heads in memory, as fused kernels write it and models read it."""
    if x.dim() < 3:
        return x.contiguous()
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def query_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    lse: bool = False,
) -> AttentionQuery:
    """What a call with these tensors (fakes will do) asks of a provider."""
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "additive"
    causal = is_causal and mask is None
    return AttentionQuery(
        device=q.device.type,
        dtype=q.dtype,
        heads=q.shape[-3] if q.dim() > 2 else 1,
        kv_heads=k.shape[-3] if k.dim() > 2 else 1,
        q_tokens=q.shape[-2],
        k_tokens=k.shape[-2],
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        mask=kind,  # type: ignore[arg-type]
        is_causal=causal,
        lse=lse,
        card=q.device.index,
    )


def attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    provider: str,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What ``attention`` gives, with the log-sum-exp if that is asked for, as it comes to lie in memory."""
    shape = output_shape(q, k, v, mask, enable_gqa)
    chosen = choose(provider, query_of(q, k, v, mask, is_causal, lse))
    if math.prod(shape[:-1]) == 0 or k.shape[-2] == 0:
        out = empty_output(q, shape).zero_()
        return out, q.new_full(shape[:-1], -math.inf, dtype=torch.float32) if lse else None
    call = _regular(q, k, v, mask, is_causal, scale, shape, enable_gqa, lse)
    out, log = chosen.run(call)
    settled = q.device.type in chosen.settled
    if call.mask is not None and not (settled and log is None):
        blind = _blind(call.mask)
        out = out if settled else out.masked_fill(blind.unsqueeze(-1), 0)
        log = None if log is None else log.masked_fill(blind, -math.inf)
    return out.to(q.dtype).reshape(shape), None if log is None else log.float().reshape(shape[:-1])


def _regular(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    shape: tuple[int, ...],
    enable_gqa: bool,
    lse: bool,
) -> Call:
    """The same call with four dims everywhere and at most one of mask and is_causal."""
    batch, heads = shape[:-3], shape[-3] if len(shape) > 2 else 1
    held = k.shape[-3] if enable_gqa else heads
    if mask is not None and is_causal:
        mask, is_causal = _with_causal(mask, q.shape[-2], k.shape[-2]), False
    return Call(
        q=_regular_rows(q, batch, heads),
        k=_regular_rows(k, batch, held),
        v=_regular_rows(v, batch, held),
        mask=None if mask is None else _regular_mask(mask, batch, q.dtype),
        is_causal=is_causal,
        scale=1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        lse=lse,
    )


def _regular_rows(x: torch.Tensor, batch: tuple[int, ...], heads: int) -> torch.Tensor:
    """``[B, heads, S, D]``, each row in one piece of memory: kernels step from number to number without asking."""
    rows = x
    if x.dim() != 4 or x.shape[1] != heads or x.shape[:1] != batch:
        rows = x.expand(*batch, heads, *x.shape[-2:]).reshape(-1, heads, *x.shape[-2:])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _regular_mask(mask: torch.Tensor, batch: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Four dims, each 1 or full: leading dims that are not all 1 are expanded and flattened."""
    if mask.dtype not in (torch.bool, dtype):
        mask = mask.to(dtype)
    mask = mask.reshape((1,) * (len(batch) + 3 - mask.dim()) + tuple(mask.shape))
    if math.prod(mask.shape[:-3]) != 1:
        mask = mask.expand(*batch, *mask.shape[-3:])
    return mask.reshape(-1, *mask.shape[-3:])


def _with_causal(mask: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    causal = causal_mask(queries, keys, mask.device)
    return mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -math.inf)


def _blind(mask: torch.Tensor) -> torch.Tensor:
    """Rows that see no key."""
    return ~mask.any(-1) if mask.dtype == torch.bool else (mask == -math.inf).all(-1)
