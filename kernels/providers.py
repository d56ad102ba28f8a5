"""Attention kernels, each with what it can do; none is imported or called before it is asked.

A provider computes on what ``attention`` has made regular: four-dimensional, non-empty ``q [B, Hq, Sq, D]``,
``k [B, Hkv, Sk, D]`` and ``v [B, Hkv, Sk, Dv]``, and a mask of four dims, each 1 or full, never with ``is_causal``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from .chunked import chunked_attention
from .reference import additive, attention_reference, repeat_heads

_ALIGNED = 16
_HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class AttentionQuery:
    """What an attention call needs, in terms that a provider can refuse.

    Args:
        device: device type, ``cpu`` or ``cuda``.
        dtype: of q, k and v.
        heads, kv_heads: query heads and key heads; they differ for grouped queries.
        q_tokens, k_tokens: sequence lengths.
        head_dim, v_head_dim: of q and k, and of v.
        mask: kind of mask.
        is_causal: whether each query sees only keys up to its own position.
        lse: whether the log-sum-exp is needed, as ring attention does.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    q_tokens: int
    k_tokens: int
    head_dim: int
    v_head_dim: int
    mask: Literal["none", "bool", "additive"] = "none"
    is_causal: bool = False
    lse: bool = False


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
    """

    name: str
    run: Callable[[Call], Result]
    refusals: tuple[Callable[[AttentionQuery], str | None], ...] = ()
    settled: tuple[str, ...] = ()

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
    return call.mask is None and call.q.dtype in _HALF and width == call.v.shape[-1] and width <= 256


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


def _flash_attn(call: Call) -> Result:
    """FlashAttention-2 (arXiv:2307.08691); it keeps tokens before heads and shares key heads itself."""
    found = importlib.import_module("flash_attn").flash_attn_func(
        *(x.transpose(1, 2) for x in (call.q, call.k, call.v)),
        softmax_scale=call.scale,
        causal=call.is_causal,
        return_attn_probs=call.lse,
    )
    out, lse = (found[0], found[1]) if call.lse else (found, None)
    return out.transpose(1, 2), lse


def _yunchang(call: Call) -> Result:
    """The forward kernel of USP (arXiv:2405.07719), with tokens before heads."""
    out, lse = importlib.import_module("yunchang.kernels").flash_attn_forward(
        *(x.transpose(1, 2) for x in call.heads_repeated()), softmax_scale=call.scale, causal=call.is_causal
    )
    return out.transpose(1, 2), lse if call.lse else None


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


def _runs_on(*devices: str) -> Callable[[AttentionQuery], str | None]:
    def refusal(query: AttentionQuery) -> str | None:
        return None if query.device in devices else f"runs on {' or '.join(devices)}, not on {query.device}"

    return refusal


def _cuda_takes(dtypes: tuple[torch.dtype, ...]) -> Callable[[AttentionQuery], str | None]:
    def refusal(query: AttentionQuery) -> str | None:
        if query.device != "cuda" or query.dtype in dtypes:
            return None
        return f"takes {', '.join(_name(dtype) for dtype in dtypes)} on cuda, not {_name(query.dtype)}"

    return refusal


def _installed(module: str, command: str) -> Callable[[AttentionQuery], str | None]:
    def refusal(query: AttentionQuery) -> str | None:
        return None if _is_there(module) else f"is not installed; run: {command}"

    return refusal


@functools.cache
def _is_there(module: str) -> bool:
    """Whether a package can be imported; looked up once, as every attention of a call asks."""
    return importlib.util.find_spec(module) is not None


def _head_dim_up_to(limit: int) -> Callable[[AttentionQuery], str | None]:
    def refusal(query: AttentionQuery) -> str | None:
        widest = max(query.head_dim, query.v_head_dim)
        return f"takes head dims up to {limit}, not {widest}" if query.device == "cuda" and widest > limit else None

    return refusal


def _floating(query: AttentionQuery) -> str | None:
    return None if query.dtype.is_floating_point else f"takes floating point tensors, not {_name(query.dtype)}"


def _no_lse(query: AttentionQuery) -> str | None:
    return "returns no log-sum-exp, which ring attention needs; choose sdpa_flash or auto" if query.lse else None


def _no_mask(query: AttentionQuery) -> str | None:
    return "takes no mask; choose auto" if query.mask != "none" else None


def _no_mask_on_cuda(query: AttentionQuery) -> str | None:
    return _no_mask(query) if query.device == "cuda" else None


def _equal_head_dims(query: AttentionQuery) -> str | None:
    if query.head_dim == query.v_head_dim:
        return None
    return f"needs equal head dims of keys and values, not {query.head_dim} and {query.v_head_dim}"


def _head_dim_multiple_of(step: int) -> Callable[[AttentionQuery], str | None]:
    def refusal(query: AttentionQuery) -> str | None:
        if query.head_dim % step == 0 and query.v_head_dim % step == 0:
            return None
        return f"needs head dims that are multiples of {step}, not {query.head_dim} and {query.v_head_dim}"

    return refusal


def _square_causal(query: AttentionQuery) -> str | None:
    if query.is_causal and query.q_tokens != query.k_tokens:
        return "aligns a causal mask at the end, which differs where queries and keys differ in number; choose auto"
    return None


def _square_causal_on_cuda(query: AttentionQuery) -> str | None:
    return _square_causal(query) if query.device == "cuda" else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_FLASH_ATTN_COMMAND = "pip install flash-attn --no-build-isolation"
_FLASH_ATTN_LIMITS = (
    _runs_on("cuda"),
    _cuda_takes(_HALF),
    _no_mask,
    _equal_head_dims,
    _head_dim_multiple_of(8),
    _head_dim_up_to(256),
    _square_causal,
)

SDPA = Provider("sdpa", _sdpa, (_floating, _no_lse), ("cpu",))
SDPA_MATH = Provider("sdpa_math", _sdpa_math, (_floating,), ("cpu", "cuda"))
SDPA_FLASH = Provider(
    "sdpa_flash",
    _sdpa_flash,
    (
        _runs_on("cpu", "cuda"),
        _floating,
        _cuda_takes(_HALF),
        _no_mask_on_cuda,
        _head_dim_up_to(256),
        _square_causal_on_cuda,
    ),
    ("cpu",),
)
SDPA_EFFICIENT = Provider(
    "sdpa_efficient",
    _sdpa_efficient,
    (_runs_on("cuda"), _cuda_takes((*_HALF, torch.float32)), _head_dim_multiple_of(8)),
)
SDPA_CUDNN = Provider(
    "sdpa_cudnn",
    _sdpa_cudnn,
    (_runs_on("cuda"), _cuda_takes(_HALF), _head_dim_multiple_of(8), _head_dim_up_to(128)),
)
FLASH_ATTN = Provider("flash_attn", _flash_attn, (_installed("flash_attn", _FLASH_ATTN_COMMAND), *_FLASH_ATTN_LIMITS))
YUNCHANG = Provider(
    "yunchang",
    _yunchang,
    (
        _installed("yunchang", "pip install yunchang"),
        _installed("flash_attn", _FLASH_ATTN_COMMAND),
        *_FLASH_ATTN_LIMITS,
    ),
)
CHUNKED = Provider("chunked", _chunked, (_floating,), ("cpu", "cuda"))
