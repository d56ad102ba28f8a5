"""The other autoencoder classes of diffusers, tiny: of pictures, videos and sound, with masks, times and noise."""

from __future__ import annotations

from typing import Any

import torch
from zoo.autoencoders import _KL, _LTX, Autoencoder
from zoo.transformers import Draw

_THREE = {"block_out_channels": (16,) * 3, "layers_per_block": 1}
_HUNYUAN = {"latent_channels": 8, "spatial_compression_ratio": 4}
_LTX_2 = {**_LTX, "decoder_block_out_channels": (8, 16, 32), "decoder_layers_per_block": (1,) * 4}
_LTX_TIMED = {**_LTX, "timestep_conditioning": True}
_MAGVIT = {
    "latent_channels": 4,
    "block_out_channels": (4, 8),
    "down_block_types": ("SpatialDownBlock3D", "SpatialTemporalDownBlock3D"),
    "up_block_types": ("SpatialUpBlock3D", "SpatialTemporalUpBlock3D"),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
_COSMOS = {
    "latent_channels": 6,
    "encoder_block_out_channels": (8,) * 3,
    "decode_block_out_channels": (8,) * 3,
    "attention_resolutions": (8,),
    "resolution": 64,
    "num_layers": 1,
    "latents_mean": [0.0] * 6,
    "latents_std": [1.0] * 6,
}
_COSMOS_SIZES = {"patch_size": 4, "spatial_compression_ratio": 8, "temporal_compression_ratio": 8}
_VIDTOK = {
    "ch": 32, "ch_mult": [1, 2, 2], "z_channels": 4, "num_res_blocks": 1,
    "spatial_ds": [0, 1], "spatial_us": [1, 2], "tempo_ds": [1], "tempo_us": [1],
}  # fmt: skip
_ASYMMETRIC = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "down_block_out_channels": (4, 4, 6, 8),
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "up_block_out_channels": (4, 8, 16, 16),
    "norm_num_groups": 2,
}
_CONSISTENCY = {
    "encoder_block_out_channels": (4, 8),
    "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
    "encoder_norm_num_groups": 2,
    "encoder_layers_per_block": 1,
    "decoder_block_out_channels": (8, 8),
    "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "decoder_layers_per_block": 1,
    "decoder_norm_num_groups": 2,
}
_TWO_KL = {**_KL, "block_out_channels": (4, 8)}
_DOWN, _UP = {"down_block_types": ("DownEncoderBlock2D",) * 2}, {"up_block_types": ("UpDecoderBlock2D",) * 2}

MORE: dict[str, Autoencoder] = {
    "asymmetric": Autoencoder("AsymmetricAutoencoderKL", _ASYMMETRIC, (1, 4, 11, 6), (1, 3, 88, 48)),
    "consistency": Autoencoder("ConsistencyDecoderVAE", _CONSISTENCY, (1, 4, 11, 6), (1, 3, 22, 12)),
    "cosmos": Autoencoder("AutoencoderKLCosmos", _COSMOS | _COSMOS_SIZES, (1, 6, 2, 11, 4), (1, 3, 9, 176, 64)),
    "cosmos_rearranged": Autoencoder(
        "AutoencoderKLCosmos", _COSMOS | _COSMOS_SIZES | {"patch_type": "rearrange"},
        (1, 6, 2, 11, 4), (1, 3, 9, 176, 64),
    ),
    "flux_2": Autoencoder(
        "AutoencoderKLFlux2",
        {"block_out_channels": (4, 6, 8, 8), "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 4},
        (1, 4, 11, 6), (1, 3, 88, 48),
    ),
    "hunyuan_image": Autoencoder(
        "AutoencoderKLHunyuanImage",
        _HUNYUAN | {
            "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32, 64), "layers_per_block": 1,
            "sample_size": 64,
        },
        (1, 8, 11, 6), (1, 3, 44, 24),
    ),
    "hunyuan_refiner": Autoencoder(
        "AutoencoderKLHunyuanImageRefiner", _HUNYUAN | _THREE | {"temporal_compression_ratio": 2},
        (1, 8, 2, 11, 4), (1, 3, 3, 44, 16),
    ),
    "hunyuan_15": Autoencoder(
        "AutoencoderKLHunyuanVideo15", _HUNYUAN | _THREE | {"temporal_compression_ratio": 2},
        (1, 8, 2, 11, 4), (1, 3, 3, 44, 16),
    ),
    "kandinsky_6": Autoencoder(
        "Kandinsky6SRVAE",
        {
            "latent_channels": 4, "encoder_block_out_channels": (4, 8, 8), "decoder_block_out_channels": (4, 8, 8),
            "layers_per_block": 1, "temporal_compression_ratio": 2,
        },
        (1, 4, 2, 11, 4), (1, 3, 3, 88, 32),
    ),
    "kvae": Autoencoder(
        "AutoencoderKLKVAE",
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)},
        (1, 4, 11, 6), (1, 3, 44, 24),
    ),
    "kvae_audio": Autoencoder(
        "AutoencoderKLKVAEAudio",
        {
            "encoder_dim": 4, "encoder_rates": [2, 3], "latent_dim": 16, "codebook_dim": 4, "decoder_dim": 16,
            "decoder_rates": [3, 2], "attn_num_heads": 2,
        },
        (1, 4, 23), (1, 1, 138),
    ),
    "kvae_video": Autoencoder(
        "AutoencoderKLKVAEVideo",
        {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2},
        (1, 4, 2, 11, 4), (1, 3, 5, 44, 16),
    ),
    "longcat": Autoencoder(
        "LongCatAudioDiTVae",
        {
            "channels": 8, "c_mults": [2, 4], "strides": [2, 4], "latent_dim": 4, "encoder_latent_dim": 8,
            "downsampling_ratio": 8,
        },
        (1, 4, 23), (1, 1, 184),
    ),
    "ltx_2": Autoencoder("AutoencoderKLLTX2Video", _LTX_2, (1, 6, 2, 11, 4), (1, 3, 9, 352, 128)),
    "ltx_2_audio": Autoencoder(
        "AutoencoderKLLTX2Audio",
        {"base_channels": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "latent_channels": 4, "mel_bins": 16},
        (1, 4, 11, 8), (1, 2, 44, 16),
    ),
    "ltx_noise": Autoencoder(
        "AutoencoderKLLTXVideo", _LTX_TIMED | {"decoder_inject_noise": (True,) * 5},
        (1, 6, 2, 11, 4), (1, 3, 9, 352, 128),
    ),
    "ltx_timed": Autoencoder("AutoencoderKLLTXVideo", _LTX_TIMED, (1, 6, 2, 11, 4), (1, 3, 9, 352, 128)),
    "magvit": Autoencoder("AutoencoderKLMagvit", _MAGVIT, (1, 4, 2, 11, 4), (1, 3, 5, 44, 16)),
    "magvit_temporal": Autoencoder(
        "AutoencoderKLMagvit", _MAGVIT | {"spatial_group_norm": False}, (1, 4, 2, 11, 4), (1, 3, 5, 44, 16)
    ),
    "minimax": Autoencoder(
        "AutoencoderKLMiniMaxH3",
        {
            "latent_channels": 4, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2,
            "spatial_downsample_factors": (2, 2), "temporal_downsample_factors": (1, 2), "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 16, "decoder_num_register_tokens": 2,
            "latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4, "clip_length": 5, "token_drop": 1,
        },
        (1, 4, 3, 11, 6), (1, 3, 5, 44, 24),
    ),
    "minimax_audio": Autoencoder(
        "AutoencoderKLMiniMaxH3Audio",
        {
            "encoder_dim": 4, "encoder_rates": (2, 3), "latent_dim": 16, "latent_channels": 4,
            "num_attention_heads": 2, "decoder_dim": 16, "decoder_rates": (3, 2), "decoder_kernel_sizes": (5, 4),
            "resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3),),
        },
        (1, 4, 23), (1, 1, 138),
    ),
    "mmaudio": Autoencoder(
        "MMAudioVAE",
        {
            "mel_bins": 16, "latent_channels": 4, "hidden_channels": 16, "channel_multipliers": (1, 2),
            "layers_per_block": 1, "n_fft": 64, "hop_length": 16,
        },
        (1, 4, 23), (1, 736),
    ),
    "oobleck": Autoencoder(
        "AutoencoderOobleck",
        {
            "encoder_hidden_size": 4, "downsampling_ratios": [2, 3], "channel_multiples": [1, 2],
            "decoder_channels": 4, "decoder_input_channels": 4,
        },
        (1, 4, 23), (1, 2, 138),
    ),
    "qwen_21": Autoencoder(
        "AutoencoderKLQwenImage21",
        {
            "base_dim": 4, "decoder_base_dim": 4, "z_dim": 6, "dim_mult": [1, 2, 2], "num_res_blocks": 1,
            "temperal_downsample": [False, True], "latents_mean": [0.0] * 6, "latents_std": [1.0] * 6,
            "scale_factor_temporal": 2, "scale_factor_spatial": 4,
        },
        (1, 6, 1, 11, 4), (1, 4, 1, 44, 16),
    ),
    "rae": Autoencoder(
        "AutoencoderRAE",
        {
            "encoder_hidden_size": 64, "encoder_patch_size": 4, "encoder_num_hidden_layers": 2,
            "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32, "patch_size": 4, "encoder_input_size": 32, "image_size": 32,
        },
        (1, 64, 8, 8), (1, 3, 32, 32),
    ),
    "same": Autoencoder(
        "AutoencoderSAME",
        {
            "patch_size": 4, "encoder_channels": 16, "encoder_c_mults": [2], "encoder_strides": [2],
            "encoder_transformer_depths": [1], "latent_dim": 8, "dim_heads": 8,
        },
        (1, 8, 22), (1, 2, 176),
    ),
    "temporal": Autoencoder(
        "AutoencoderKLTemporalDecoder", _DOWN | {"block_out_channels": (32, 32)}, (3, 4, 11, 6), (3, 3, 22, 12)
    ),
    "tokenizer": Autoencoder(
        "Cosmos3AVAEAudioTokenizer",
        {
            "vocoder_input_dim": 4, "dec_dim": 4, "dec_c_mults": (1, 2), "dec_strides": (2, 4), "enc_dim": 8,
            "enc_intermediate_dim": 16, "enc_num_layers": 1, "enc_num_blocks": 1, "enc_n_fft": 8,
            "enc_hop_length": 2, "enc_latent_dim": 8, "enc_c_mults": (1,), "enc_strides": (4,),
        },
        (1, 4, 23), (1, 2, 184),
    ),
    "vidtok": Autoencoder("AutoencoderVidTok", _VIDTOK, (1, 4, 2, 11, 4), (1, 3, 5, 44, 16)),
    "vidtok_codes": Autoencoder(
        "AutoencoderVidTok",
        _VIDTOK | {"z_channels": 3, "codebook_size": 512, "double_z": False, "regularizer": "fsq"},
        (1, 3, 2, 11, 4), (1, 3, 5, 44, 16),
    ),
    "vq": Autoencoder("VQModel", {**_TWO_KL, **_DOWN, **_UP, "num_vq_embeddings": 16}, (1, 4, 11, 6), (1, 3, 22, 12)),
}  # fmt: skip
"""By name; the last word says what is unlike in another one of the same class."""

WHOLE = {("minimax", "decode"), ("rae", "encode"), ("rae", "decode"), ("same", "encode"), ("same", "decode")} | {
    ("minimax_audio", "decode"), ("minimax_audio", "encode"), ("tokenizer", "encode"), ("mmaudio", "encode"),
}  # fmt: skip
"""What is computed whole in part or altogether: attention over all tokens without rows, spectra of the whole sound."""


def beside(name: str, method: str, rows: int = 11, columns: int = 6) -> dict[str, Any]:
    """What a method takes beside its first input, of a latent of so many rows."""
    draw = Draw(9)
    if (name, method) == ("asymmetric", "decode"):
        image, noise = (draw.normal(1, channels, 8 * rows, 8 * columns) for channels in (3, 1))
        return {"image": image, "mask": (noise > 0).float()}
    if (name, method) == ("temporal", "decode"):
        return {"num_frames": 3}
    if name in ("ltx_noise", "ltx_timed") and method == "decode":
        return {"temb": torch.tensor([0.3])}
    return {}
