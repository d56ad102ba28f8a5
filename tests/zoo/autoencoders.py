"""Tiny diffusers autoencoders with a latent and a picture (or video) whose rows do not divide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
from torch import Tensor, nn
from zoo.transformers import Draw, randomise


@dataclass(frozen=True)
class Autoencoder:
    """A class with a small configuration, and the shapes of a latent and of a picture to encode."""

    cls: str
    config: dict[str, Any]
    latent: tuple[int, ...]
    picture: tuple[int, ...]
    tiles: dict[str, int] = field(default_factory=dict)

    def build(self, seed: int = 3) -> nn.Module:
        model = getattr(diffusers, self.cls)(**self.config)
        randomise(model, seed)
        return model.eval().requires_grad_(False)

    def small_tiles(self, model: nn.Module) -> None:
        """Turn tiling on with tiles smaller than the inputs; classes name and size them in several ways."""
        model.enable_tiling()
        for name, size in self.tiles.items():
            setattr(model, name, size)

    def given(self, method: str) -> Tensor:
        """The input of ``decode`` or ``encode``."""
        return Draw(5).normal(*(self.latent if method == "decode" else self.picture))


_KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (4, 6, 8),
    "norm_num_groups": 2,
    "latent_channels": 4,
}
_DC_BLOCKS = ("ResBlock",) * 2 + ("EfficientViTBlock",)
_DC = {
    "latent_channels": 6,
    "attention_head_dim": 3,
    "encoder_block_types": _DC_BLOCKS,
    "decoder_block_types": _DC_BLOCKS,
    "encoder_block_out_channels": (12,) * 3,
    "decoder_block_out_channels": (12,) * 3,
    "encoder_layers_per_block": (1,) * 3,
    "decoder_layers_per_block": (1,) * 3,
    "encoder_qkv_multiscales": ((),) * 2 + ((5,),),
    "decoder_qkv_multiscales": ((),) * 2 + ((5,),),
}
_LTX = {
    "latent_channels": 6,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
}
_WAN = {"base_dim": 4, "z_dim": 6, "num_res_blocks": 1, "latents_mean": [0.1] * 6, "latents_std": [0.9] * 6}

_STRIDED = {
    "tile_sample_min_height": 64,
    "tile_sample_min_width": 64,
    "tile_sample_stride_height": 48,
    "tile_sample_stride_width": 48,
}
_LATENT = {
    "tile_sample_min_height": 64,
    "tile_sample_min_width": 32,
    "tile_latent_min_height": 8,
    "tile_latent_min_width": 4,
}

AUTOENCODERS: dict[str, Autoencoder] = {
    "kl": Autoencoder(
        "AutoencoderKL", _KL, (1, 4, 11, 6), (1, 3, 45, 26),
        {"tile_sample_min_size": 24, "tile_latent_min_size": 6},
    ),
    "tiny": Autoencoder(
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (6,) * 3,
            "decoder_block_out_channels": (6,) * 3,
            "num_encoder_blocks": (1, 2, 1),
            "num_decoder_blocks": (2, 1, 1),
        },
        (2, 4, 11, 6),
        (2, 3, 45, 26),
    ),
    "dc": Autoencoder(
        "AutoencoderDC", _DC, (1, 6, 11, 6), (1, 3, 44, 24),
        dict.fromkeys(("tile_latent_min_height", "tile_latent_min_width"), 4)
        | {name: size // 4 for name, size in _STRIDED.items()},
    ),
    "dc_interpolate": Autoencoder(
        "AutoencoderDC",
        {**_DC, "upsample_block_type": "interpolate", "downsample_block_type": "Conv"},
        (1, 6, 11, 6),
        (1, 3, 44, 24),
    ),
    "cogvideox": Autoencoder(
        "AutoencoderKLCogVideoX",
        {"block_out_channels": (4, 4, 8, 8), "latent_channels": 6, "layers_per_block": 1, "norm_num_groups": 2},
        (1, 6, 3, 11, 4),
        (1, 3, 9, 90, 34),
        _LATENT,
    ),
    "mochi": Autoencoder(
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "layers_per_block": (1,) * 5,
            "latent_channels": 6,
            "latents_mean": (0.1,) * 6,
            "latents_std": (0.9,) * 6,
        },
        (1, 6, 2, 11, 4),
        (1, 3, 7, 88, 32),
        _STRIDED,
    ),
    "wan": Autoencoder("AutoencoderKLWan", _WAN, (1, 6, 3, 11, 4), (1, 3, 9, 88, 32), _STRIDED),
    "wan_residual": Autoencoder(
        "AutoencoderKLWan",
        {
            **_WAN, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
            "scale_factor_spatial": 16,
        },
        (1, 6, 2, 11, 4),
        (1, 3, 5, 176, 64),
    ),
    "hunyuan": Autoencoder(
        "AutoencoderKLHunyuanVideo",
        {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 6},
        (1, 6, 3, 11, 4),
        (1, 3, 9, 90, 34),
        _STRIDED,
    ),
    "ltx": Autoencoder("AutoencoderKLLTXVideo", _LTX, (1, 6, 2, 11, 4), (1, 3, 9, 352, 128), _STRIDED),
    "qwen": Autoencoder("AutoencoderKLQwenImage", _WAN, (1, 6, 1, 11, 4), (1, 3, 1, 88, 32), _STRIDED),
}  # fmt: skip
"""The classes that must work, some in two configurations."""


def run(model: nn.Module, method: str, given: Tensor) -> Tensor:
    """What decoding or encoding yields, as one tensor."""
    result = getattr(model, method)(given, return_dict=False)[0]
    return getattr(result, "parameters", result)


CALLS = [(name, method) for name in AUTOENCODERS for method in ("decode", "encode")]
"""Every autoencoder both ways."""
