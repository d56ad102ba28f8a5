"""Attention kernels, each with what it can do; none is imported or called before it is asked.

A provider computes on what ``attention`` has made regular: four-dimensional, non-empty ``q [B, Hq, Sq, D]``,
``k [B, Hkv, Sk, D]`` and ``v [B, Hkv, Sk, Dv]``, and a mask of four dims, each 1 or full, never with ``is_causal``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .attention_packages import kernels as packages
from .attention_packages.limits import (
    HALF,
    AttentionQuery,
    Refusal,
    cuda_takes,
    floating,
    head_dim_multiple_of,
    head_dim_up_to,
    no_lse,
    no_mask_on_cuda,
    runs_on,
    square_causal_on_cuda,
)
from .chunked import chunked_attention
from .reference import additive, attention_reference, repeat_heads

__all__ = ["AttentionQuery", "Call", "Provider"]

_ALIGNED = 16


@dataclasses.dataclass(frozen=True)
class Call:
    """The regular inputs of one attention; ``lse`` asks for the log-sum-exp as well."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    scale: float
    lse: bool

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        return self.q.shape[1] != self.k.shape[1]

    def heads_repeated(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v for a kernel that wants one key head per query head."""
        heads = self.q.shape[1]
        return self.q, repeat_heads(self.k, heads), repeat_heads(self.v, heads)


Result = tuple[torch.Tensor, torch.Tensor | None]


@dataclasses.dataclass(frozen=True)
class Provider:
    """A kernel and its limits.

    Args:
        name: what ``Plan.attention`` calls it.
        run: computes it; the log-sum-exp is ``[B, Hq, Sq]``, or None where it was not asked for.
        refusals: each gives a reason why a query is out of reach, or None.
        settled: device types on which a row that sees no key comes out as 0, as PyTorch's definition has it. What other
            fused kernels give there differs with their version; NaN is among it.
        inexact: what it rounds beyond the dtype of its operands; empty where it does not. Such a provider is taken by
            its name alone.
    """

    name: str
    run: Callable[[Call], Result]
    refusals: tuple[Refusal, ...] = ()
    settled: tuple[str, ...] = ()
    inexact: str = ""

    def unsupported(self, query: AttentionQuery) -> str | None:
        """Why this provider cannot answer the query here, or None when it can."""
        for refusal in self.refusals:
            reason = refusal(query)
            if reason:
                return reason
        return None


def _sdpa(call: Call) -> Result:
    q, k, v = (call.q, call.k, call.v) if _shared_by_fused(call) else call.heads_repeated()
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=call.mask, is_causal=call.is_causal, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out, None


def _shared_by_fused(call: Call) -> bool:
    """Whether PyTorch has a fused kernel for key heads that several query heads share: on CUDA its flash kernel alone.

    Where that cannot be, such a call falls to plain matrix products, with scores of all tokens in memory.
    """
    if not call.q.is_cuda:
        return True
    width = call.q.shape[-1]
    return call.mask is None and call.q.dtype in HALF and width == call.v.shape[-1] and width <= 256


def _sdpa_math(call: Call) -> Result:
    """The aten op takes a bool mask for numbers, 0 and 1, without a word, and gives no log-sum-exp."""
    if call.lse:
        out, lse = attention_reference(call.q, call.k, call.v, call.mask, call.is_causal, call.scale, call.grouped)
        return out.to(call.q.dtype), lse
    bias = None if call.mask is None else additive(call.mask, call.q.dtype)
    return torch.ops.aten._scaled_dot_product_attention_math(
        call.q, call.k, call.v, bias, 0.0, call.is_causal, None, scale=call.scale, enable_gqa=call.grouped
    )[0], None


def _sdpa_flash(call: Call) -> Result:
    """The CPU kernel takes additive masks, CUDA's takes none and head dims in steps of 8; both want v as wide as k."""
    on_cuda = call.q.is_cuda
    width = max(call.q.shape[-1], call.v.shape[-1])
    q, k, v = (_widen(x, _round_up(width, 8) if on_cuda else width) for x in call.heads_repeated())
    if on_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, call.is_causal, False, scale=call.scale
        )[:2]
    else:
        bias = None if call.mask is None else additive(call.mask, q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, call.is_causal, attn_mask=bias, scale=call.scale
        )
    return out[..., : call.v.shape[-1]], lse


def _sdpa_efficient(call: Call) -> Result:
    """The log-sum-exp comes padded to a multiple of 32 rows."""
    q, k, v = call.heads_repeated()
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, _aligned_bias(call), call.lse, 0.0, call.is_causal, scale=call.scale
    )[:2]
    return out, lse[..., : q.shape[2]] if call.lse else None


def _sdpa_cudnn(call: Call) -> Result:
    q, k, v = call.heads_repeated()
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, _aligned_bias(call), call.lse, 0.0, call.is_causal, False, scale=call.scale
    )[:2]
    return out, lse.reshape(q.shape[:3]) if call.lse else None


def _chunked(call: Call) -> Result:
    out, lse = chunked_attention(call.q, call.k, call.v, call.mask, call.is_causal, call.scale)
    return out, lse if call.lse else None


def _widen(x: torch.Tensor, width: int) -> torch.Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _round_up(number: int, step: int) -> int:
    return math.ceil(number / step) * step


def _aligned_bias(call: Call) -> torch.Tensor | None:
    """The mask as these CUDA kernels want it: additive, expanded, its rows 16 elements aligned in memory."""
    if call.mask is None:
        return None
    keys = call.k.shape[2]
    bias = additive(call.mask, call.q.dtype).expand(*call.mask.shape[:3], keys)
    places = (*bias.stride()[:3], bias.storage_offset())
    if bias.stride(3) != 1 or any(place % _ALIGNED for place in places):
        roomy = bias.new_empty(*bias.shape[:3], _round_up(keys, _ALIGNED))[..., :keys]
        bias = roomy.copy_(bias)
    return bias.expand(*call.q.shape[:3], keys)


def _shared(kernel: Callable[..., Result]) -> Callable[[Call], Result]:
    """A kernel of another package, which takes fewer key heads than query heads."""
    return lambda call: kernel(call.q, call.k, call.v, call.scale, call.is_causal, call.lse)


def _repeated(kernel: Callable[..., Result]) -> Callable[[Call], Result]:
    """The same of one that wants a key head for every query head."""
    return lambda call: kernel(*call.heads_repeated(), call.scale, call.is_causal, call.lse)


SDPA = Provider("sdpa", _sdpa, (floating, no_lse), ("cpu",))
SDPA_MATH = Provider("sdpa_math", _sdpa_math, (floating,), ("cpu", "cuda"))
SDPA_FLASH = Provider(
    "sdpa_flash",
    _sdpa_flash,
    (
        runs_on("cpu", "cuda"),
        floating,
        cuda_takes(HALF),
        no_mask_on_cuda,
        head_dim_up_to(256),
        square_causal_on_cuda,
    ),
    ("cpu",),
)
SDPA_EFFICIENT = Provider(
    "sdpa_efficient",
    _sdpa_efficient,
    (runs_on("cuda"), cuda_takes((*HALF, torch.float32)), head_dim_multiple_of(8)),
)
SDPA_CUDNN = Provider(
    "sdpa_cudnn",
    _sdpa_cudnn,
    (runs_on("cuda"), cuda_takes(HALF), head_dim_multiple_of(8), head_dim_up_to(128)),
)
FLASH_ATTN = Provider("flash_attn", _shared(packages.flash_attn), packages.FLASH_ATTN_LIMITS)
FLASH_ATTN_3 = Provider("flash_attn_3", _shared(packages.flash_attn_3), packages.FLASH_ATTN_3_LIMITS)
FLASH_ATTN_4 = Provider("flash_attn_4", _shared(packages.flash_attn_4), packages.FLASH_ATTN_4_LIMITS)
SAGE = Provider(
    "sage",
    _shared(packages.sage),
    packages.SAGE_LIMITS,
    inexact="queries and keys are multiplied in int8, weights and values in fp8 or fp16, by the card",
)
YUNCHANG = Provider("yunchang", _repeated(packages.yunchang), packages.YUNCHANG_LIMITS)
CHUNKED = Provider("chunked", _chunked, (floating,), ("cpu", "cuda"))
