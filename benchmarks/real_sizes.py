"""Published denoisers at their real widths with few blocks, and one call of each, all on the meta device.

Configurations are those of the model cards; sizes are the ones that the models were published for. Equal blocks are one
structure, so that few stand for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from capture import flux
from torch import nn

Subject = tuple[nn.Module, dict[str, Any]]


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _built(kind: Callable[..., nn.Module], **config: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(**config).eval()


def flux_dev(depth: int) -> Subject:
    """FLUX.1-dev, 1,024 x 1,024 pixels."""
    return flux(depth, depth)


def sd3_medium(depth: int) -> Subject:
    """Stable Diffusion 3 medium, 1,024 x 1,024 pixels, both branches of guidance."""
    others_and_last = depth + 1
    model = _built(
        diffusers.SD3Transformer2DModel, sample_size=128, num_layers=others_and_last, num_attention_heads=24,
        caption_projection_dim=1536, pos_embed_max_size=192,
    )  # fmt: skip
    return model, {
        "hidden_states": _empty(2, 16, 128, 128), "encoder_hidden_states": _empty(2, 333, 4096),
        "pooled_projections": _empty(2, 2048), "timestep": _empty(2), "return_dict": False,
    }  # fmt: skip


def pixart_sigma(depth: int) -> Subject:
    """PixArt-Sigma XL, 1,024 x 1,024 pixels, both branches, text of full length."""
    model = _built(
        diffusers.PixArtTransformer2DModel,
        sample_size=128,
        num_layers=depth,
        use_additional_conditions=False,
        caption_channels=4096,
    )
    return model, {
        "hidden_states": _empty(2, 4, 128, 128), "encoder_hidden_states": _empty(2, 300, 4096),
        "timestep": _empty(2), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False,
    }  # fmt: skip


def hunyuan_dit(depth: int) -> Subject:
    """HunyuanDiT 1.2, 1,024 x 1,024 pixels, both branches."""
    model = _built(
        diffusers.HunyuanDiT2DModel, num_attention_heads=16, attention_head_dim=88, in_channels=4, patch_size=2,
        sample_size=128, hidden_size=1408, num_layers=depth, mlp_ratio=4.3637, cross_attention_dim=1024,
        cross_attention_dim_t5=2048, pooled_projection_dim=1024, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    return model, {
        "hidden_states": _empty(2, 4, 128, 128), "timestep": _empty(2), "encoder_hidden_states": _empty(2, 77, 1024),
        "text_embedding_mask": _empty(2, 77), "encoder_hidden_states_t5": _empty(2, 256, 2048),
        "text_embedding_mask_t5": _empty(2, 256), "image_meta_size": None, "style": None,
        "image_rotary_emb": (_empty(4096, 88), _empty(4096, 88)), "return_dict": False,
    }  # fmt: skip


def cogvideox(depth: int) -> Subject:
    """CogVideoX 5B, 49 frames of 720 x 480 pixels, both branches."""
    model = _built(
        diffusers.CogVideoXTransformer3DModel, num_attention_heads=48, num_layers=depth,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    tokens = 13 * 30 * 45
    return model, {
        "hidden_states": _empty(2, 13, 16, 60, 90), "encoder_hidden_states": _empty(2, 226, 4096),
        "timestep": _empty(2), "image_rotary_emb": (_empty(tokens, 64), _empty(tokens, 64)), "return_dict": False,
    }  # fmt: skip


def wan_14b(depth: int) -> Subject:
    """Wan 2.1 14B, 81 frames of 832 x 480 pixels."""
    model = _built(diffusers.WanTransformer3DModel, num_layers=depth)
    return model, {
        "hidden_states": _empty(1, 16, 21, 60, 104), "encoder_hidden_states": _empty(1, 512, 4096),
        "timestep": _empty(1), "return_dict": False,
    }  # fmt: skip


def hunyuan_video(depth: int) -> Subject:
    """HunyuanVideo, 61 frames of 960 x 544 pixels, text of full length."""
    model = _built(
        diffusers.HunyuanVideoTransformer3DModel, num_layers=depth, num_single_layers=depth, num_refiner_layers=2
    )
    return model, {
        "hidden_states": _empty(1, 16, 16, 68, 120), "encoder_hidden_states": _empty(1, 256, 4096),
        "encoder_attention_mask": _empty(1, 256), "pooled_projections": _empty(1, 768), "timestep": _empty(1),
        "guidance": _empty(1), "return_dict": False,
    }  # fmt: skip


MODELS: dict[str, Callable[[int], Subject]] = {
    "FLUX.1-dev": flux_dev,
    "SD3-medium": sd3_medium,
    "PixArt-Sigma": pixart_sigma,
    "HunyuanDiT": hunyuan_dit,
    "CogVideoX-5B": cogvideox,
    "Wan-14B": wan_14b,
    "HunyuanVideo": hunyuan_video,
}
