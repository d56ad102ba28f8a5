"""What stands for FlashAttention 3 on a CPU: its signature and forms, computed by the definition.

Signatures as in hopper/flash_attn_interface.py of Dao-AILab/flash-attention: the latest at 0251105a (version 3.0.0,
2026-08-15), which returns the log-sum-exp if it is asked; at v2.8.3, which never does; at v2.8.0, which always does.
"""

from __future__ import annotations

import torch

from xdit_compile.kernels.reference import attention_reference

CALLS: list[dict[str, object]] = []


def computed(q, k, v, softmax_scale, causal):
    """What the kernel gives for tokens before heads; it takes half precision, and rows in one piece of memory."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k, v))
    assert k.shape == v.shape and q.shape[2] % k.shape[2] == 0 and q.shape[3] == k.shape[3] <= 256
    CALLS.append({"shape": tuple(q.shape), "scale": softmax_scale, "causal": causal})
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attention_reference(q, k, v, None, causal, softmax_scale, q.shape[1] != k.shape[1])
    return out.transpose(1, 2).to(q.dtype), lse


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """The latest."""
    made = computed(q, k, v, softmax_scale, causal)
    return made if return_attn_probs else made[0]


def without_lse(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    """That of v2.8.3."""
    return computed(q, k, v, softmax_scale, causal)[0]


def always_both(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
):
    """That of v2.8.0."""
    return computed(q, k, v, softmax_scale, causal)
