"""What stands for FlashAttention 4 on a CPU: its signature and forms, computed by the definition.

As in flash_attn/cute/interface.py of Dao-AILab/flash-attention, fa4-v4.0.0.beta27. The wheel of flash-attn-4 puts this
folder into a ``flash_attn`` that has no ``__init__.py``.
"""

from __future__ import annotations

from flash_attn_interface import CALLS, computed

__all__ = ["CALLS", "flash_attn_func"]


def flash_attn_func(
    q,
    k,
    v,
    qv=None,
    gather_kv_indices=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    block_sparse_tensors_bwd=None,
    return_lse=False,
):
    """Always a pair; without gradients its second is None where it is not asked for."""
    assert qv is None and gather_kv_indices is None
    out, lse = computed(q, k, v, softmax_scale, causal)
    return out, lse if return_lse else None
