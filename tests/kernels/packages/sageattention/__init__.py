"""What stands for SageAttention on a CPU: its signature and forms, and its rounding of queries and keys to int8.

As ``sageattn`` in sageattention/core.py of thu-ml/SageAttention, version 2.2.0, with the Triton kernel's one scale for
128 queries and for 64 keys.
"""

from __future__ import annotations

import torch

from xdit_compile.kernels.reference import attention_reference, repeat_heads

CALLS: list[dict[str, object]] = []


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    """Heads before tokens for HND. The mean of the keys is taken off, and comes back in the log-sum-exp."""
    assert tensor_layout == "HND" and not kwargs and q.shape[-1] == v.shape[-1] <= 128
    assert all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k, v))
    assert not is_causal or q.shape[2] == k.shape[2]
    CALLS.append({"shape": tuple(q.shape), "scale": sm_scale, "causal": is_causal})
    scale = sm_scale if sm_scale is not None else q.shape[-1] ** -0.5
    grouped, mean = q.shape[1] != k.shape[1], k.mean(2, keepdim=True)
    rounded = _int8(q, 128), _int8(k - mean, 64)
    out, lse = attention_reference(*rounded, v.float(), None, is_causal, scale, grouped)
    back = torch.matmul(q, repeat_heads(mean, q.shape[1]).transpose(2, 3)).squeeze(-1).to(torch.float32)
    return (out.to(q.dtype), lse + back * scale) if return_lse else out.to(q.dtype)


def _int8(x: torch.Tensor, block: int) -> torch.Tensor:
    pieces = []
    for piece in x.float().split(block, 2):
        step = piece.abs().amax((2, 3), keepdim=True).clamp_min(1e-12) / 127
        pieces.append((piece / step).round() * step)
    return torch.cat(pieces, 2)
