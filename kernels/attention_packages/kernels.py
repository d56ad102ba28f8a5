"""Calls of attention kernels of other packages, and the limits that their sources name.

Each takes q ``[B, Hq, S, D]``, k and v ``[B, Hkv, Sk, D]`` in fp16 or bfloat16, and gives ``[B, Hq, S, D]`` with, where
that is asked for, the natural logarithm of the sum of the exponentials of the scaled scores, fp32 ``[B, Hq, S]``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from xdit_compile.errors import ProviderUnavailable
from xdit_compile.plan.packages import ATTENTION_PACKAGES

from .installed import imported
from .limits import (
    HALF,
    at_least,
    cuda_takes,
    equal_head_dims,
    head_dim_multiple_of,
    head_dim_of_card,
    head_dim_up_to,
    installed,
    needs_card,
    no_mask,
    runs_on,
    square_causal,
)

Result = tuple[torch.Tensor, torch.Tensor | None]

FLASH_LIMITS = (
    runs_on("cuda"),
    cuda_takes(HALF),
    no_mask,
    equal_head_dims,
    head_dim_multiple_of(8),
    head_dim_up_to(256),
    square_causal,
)
FLASH_ATTN_LIMITS = (installed(*ATTENTION_PACKAGES["flash_attn"]), *FLASH_LIMITS)
YUNCHANG_LIMITS = (installed(*ATTENTION_PACKAGES["yunchang"]), *FLASH_ATTN_LIMITS)
FLASH_ATTN_3_LIMITS = (
    installed(*ATTENTION_PACKAGES["flash_attn_3"]),
    *FLASH_LIMITS,
    needs_card((9, 0)),
)
"""Of hopper/flash_api.cpp (3.0.0). It takes some pairs of unequal head dims, too, which no model here has."""
BLACKWELL = ((10, 0), (10, 3), (11, 0))
FLASH_ATTN_4_LIMITS = (
    installed(*ATTENTION_PACKAGES["flash_attn_4"]),
    *FLASH_LIMITS,
    needs_card((9, 0), *BLACKWELL),
    head_dim_of_card(128, *BLACKWELL),
)
"""Of ``_validate_head_dims`` in flash_attn/cute/interface.py (fa4-v4.0.0.beta4 to beta27), what all of these take."""
SAGE_LIMITS = (
    installed(*ATTENTION_PACKAGES["sage"]),
    at_least("sageattention", (2, 2), "version 1 writes to the keys that it is given and returns no log-sum-exp"),
    runs_on("cuda"),
    cuda_takes(HALF),
    no_mask,
    equal_head_dims,
    head_dim_up_to(128),
    square_causal,
    needs_card((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)),
)
"""Of ``sageattn`` in sageattention/core.py (2.2.0), which picks a kernel by the card."""


def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, lse: bool) -> Result:
    """FlashAttention-2 (arXiv:2307.08691); it keeps tokens before heads and shares key heads itself."""
    function = imported("flash_attn", "flash_attn").flash_attn_func
    made = function(*_token_major(q, k, v), softmax_scale=scale, causal=causal, return_attn_probs=lse)
    return _heads_first("flash_attn", made, q, v, lse)


def yunchang(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, lse: bool) -> Result:
    """The forward kernel of USP (arXiv:2405.07719), with tokens before heads and a key head for every query head."""
    function = imported("yunchang", "yunchang.kernels").flash_attn_forward
    made = function(*_token_major(q, k, v), softmax_scale=scale, causal=causal)
    return _heads_first("yunchang", made, q, v, lse)


def flash_attn_3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, lse: bool) -> Result:
    """FlashAttention-3 (arXiv:2407.08608); it keeps tokens before heads and shares key heads itself.

    Before ed209409 (2025-07-11) it always returned the log-sum-exp, then never, and since 203b9b3d (2025-08-29) on
    demand.
    """
    function = imported("flash_attn_3", "flash_attn_interface").flash_attn_func
    asked = {"return_attn_probs": True} if lse and _takes(function, "return_attn_probs") else {}
    made = function(*_token_major(q, k, v), softmax_scale=scale, causal=causal, **asked)
    return _heads_first("flash_attn_3", made, q, v, lse)


def flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, lse: bool) -> Result:
    """FlashAttention-4, in the CuTe DSL; it keeps tokens before heads and shares key heads itself.

    It always returns a pair, whose second is None where no log-sum-exp is asked for. It compiles at its first call.
    """
    function = imported("flash_attn_4", "flash_attn.cute").flash_attn_func
    made = function(*_token_major(q, k, v), softmax_scale=scale, causal=causal, return_lse=lse)
    return _heads_first("flash_attn_4", made, q, v, lse)


def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, lse: bool) -> Result:
    """SageAttention 2 (arXiv:2410.02367, 2411.10958, 2505.21136); heads before tokens, and it shares key heads itself.

    It takes the mean off the keys and adds what that is in the log-sum-exp as a product in the dtype of q, so that the
    log-sum-exp has no more digits than that.
    """
    function = imported("sage", "sageattention").sageattn
    made = function(q, k, v, tensor_layout="HND", is_causal=causal, sm_scale=scale, return_lse=lse)
    return _fitting("sage", *_pair(made), q, v, lse)


def _token_major(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _heads_first(name: str, made: Any, q: torch.Tensor, v: torch.Tensor, lse: bool) -> Result:
    out, log = _pair(made)
    return _fitting(name, out.transpose(1, 2), log, q, v, lse)


def _pair(made: Any) -> Result:
    """Result and log-sum-exp of a kernel that gives either the first alone or both, and maybe more."""
    return (made[0], made[1]) if isinstance(made, tuple | list) else (made, None)


def _fitting(name: str, out: torch.Tensor, log: Any, q: torch.Tensor, v: torch.Tensor, lse: bool) -> Result:
    """What a kernel gave, if it has the form that its source names.

    Raises:
        ProviderUnavailable: it has not, as of a version that is not known here.
    """
    wanted = (*q.shape[:3], v.shape[-1])
    if out.shape != wanted:
        raise ProviderUnavailable(f"attention {name!r} gave {tuple(out.shape)} for {wanted}; use a known version")
    if not lse:
        return out, None
    if log is None:
        raise ProviderUnavailable(f"attention {name!r} of this version gives no log-sum-exp; install a later one")
    if log.shape != wanted[:3]:
        told = f"gave a log-sum-exp of {tuple(log.shape)} for {wanted[:3]}; use a known version"
        raise ProviderUnavailable(f"attention {name!r} {told}")
    return out, log.float()


@functools.cache
def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
