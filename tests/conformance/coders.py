"""Autoencoders that no pipeline here reaches, by themselves; a case has the name of its class."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from conformance.alone import Alone, Coder
from conformance.parts import drawn
from torch import nn
from zoo.autoencoders import AUTOENCODERS
from zoo.call import call as called
from zoo.call import normal

_WAN = {"latents_mean": [0.1] * 6, "latents_std": [0.9] * 6}


def _made(cls: type, **config: Any) -> nn.Module:
    return drawn(cls(**config))


def _asymmetric() -> nn.Module:
    return _made(
        diffusers.AsymmetricAutoencoderKL, down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(4, 8),
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4,
    )  # fmt: skip


def _cosmos() -> nn.Module:
    return _made(
        diffusers.AutoencoderKLCosmos, latent_channels=6, encoder_block_out_channels=(8, 8, 16, 16),
        decode_block_out_channels=(8, 16, 16, 16), attention_resolutions=(8,), resolution=64, num_layers=1, **_WAN,
    )  # fmt: skip


def _hunyuan_image() -> nn.Module:
    return _made(
        diffusers.AutoencoderKLHunyuanImage, in_channels=3, out_channels=3, latent_channels=8,
        block_out_channels=(32, 64), layers_per_block=1, spatial_compression_ratio=2, sample_size=32,
    )  # fmt: skip


def _hunyuan(cls: type) -> nn.Module:
    return _made(cls, latent_channels=4, block_out_channels=(8, 16, 16, 32, 32), layers_per_block=1)


def _kvae() -> nn.Module:
    return _made(
        diffusers.AutoencoderKLKVAE, channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 2),
    )  # fmt: skip


def _kvae_video() -> nn.Module:
    return _made(diffusers.AutoencoderKLKVAEVideo, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4)


def _kvae_audio() -> nn.Module:
    return _made(
        diffusers.AutoencoderKLKVAEAudio, encoder_dim=8, encoder_rates=[2, 4], latent_dim=32, codebook_dim=6,
        decoder_dim=32, decoder_rates=[4, 2], attn_num_heads=2,
    )  # fmt: skip


def _ltx2() -> nn.Module:
    return _made(
        diffusers.AutoencoderKLLTX2Video, latent_channels=6, block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 16, 32), layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4,
    )  # fmt: skip


def _ltx2_audio() -> nn.Module:
    return _made(diffusers.AutoencoderKLLTX2Audio, base_channels=8, ch_mult=(1, 2), num_res_blocks=1, latent_channels=4)


def _minimax_h3() -> nn.Module:
    return _made(
        diffusers.AutoencoderKLMiniMaxH3, latent_channels=6, block_out_channels=(8, 8, 16), layers_per_block=1,
        spatial_downsample_factors=(2, 2, 1), temporal_downsample_factors=(1, 2, 2), norm_num_groups=2,
        decoder_num_layers=2, decoder_num_attention_heads=2, decoder_attention_head_dim=16, clip_length=9,
        token_drop=1, latents_mean=(0.0,) * 6, latents_std=(1.0,) * 6,
    )  # fmt: skip


def _minimax_h3_audio() -> nn.Module:
    return _made(
        diffusers.AutoencoderKLMiniMaxH3Audio, encoder_dim=8, encoder_rates=(2, 4), latent_dim=32, latent_channels=8,
        num_attention_heads=2, decoder_dim=16, decoder_rates=(4, 2), decoder_kernel_sizes=(8, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),),
    )  # fmt: skip


def _qwen21() -> nn.Module:
    return _made(
        diffusers.AutoencoderKLQwenImage21, base_dim=4, decoder_base_dim=4, z_dim=6, dim_mult=[1, 2, 2],
        num_res_blocks=1, temperal_downsample=[False, True], in_channels=3, out_channels=3, scale_factor_temporal=2,
        scale_factor_spatial=4, **_WAN,
    )  # fmt: skip


def _rae() -> nn.Module:
    return _made(
        diffusers.AutoencoderRAE, encoder_type="mae", encoder_hidden_size=64, encoder_patch_size=4,
        encoder_num_hidden_layers=2, decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=48, patch_size=4, encoder_input_size=32, image_size=32,
    )  # fmt: skip


def _same() -> nn.Module:
    return _made(
        diffusers.AutoencoderSAME, patch_size=4, encoder_channels=16, encoder_c_mults=(2,), encoder_strides=(2,),
        encoder_transformer_depths=(2,), latent_dim=6, dim_heads=8,
    )  # fmt: skip


def _vidtok() -> nn.Module:
    return _made(diffusers.AutoencoderVidTok, ch=32, ch_mult=[1, 1, 1], num_res_blocks=1)


def _consistency() -> nn.Module:
    return _made(
        diffusers.ConsistencyDecoderVAE, encoder_block_out_channels=(4, 8), encoder_norm_num_groups=2,
        encoder_down_block_types=("DownEncoderBlock2D",) * 2, encoder_layers_per_block=1,
        decoder_block_out_channels=(8, 16), decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2, decoder_layers_per_block=1, decoder_norm_num_groups=4,
    )  # fmt: skip


def _cosmos3_audio() -> nn.Module:
    return _made(
        diffusers.Cosmos3AVAEAudioTokenizer, vocoder_input_dim=6, dec_dim=8, dec_c_mults=(1, 2), dec_strides=(2, 4),
        enc_dim=16, enc_intermediate_dim=24, enc_num_layers=2, enc_latent_dim=12, enc_c_mults=(1, 2),
        enc_strides=(2, 4), hop_size=8,
    )  # fmt: skip


def _kandinsky6() -> nn.Module:
    return _made(
        diffusers.Kandinsky6SRVAE, latent_channels=6, encoder_block_out_channels=(16, 32, 32),
        decoder_block_out_channels=(16, 32, 32), layers_per_block=1, temporal_compression_ratio=2,
    )  # fmt: skip


def _longcat_audio() -> nn.Module:
    return _made(
        diffusers.LongCatAudioDiTVae, channels=8, c_mults=[1, 2], strides=[2, 4], latent_dim=8, encoder_latent_dim=16,
        downsampling_ratio=8,
    )  # fmt: skip


def _mmaudio() -> nn.Module:
    return _made(diffusers.MMAudioVAE, mel_bins=16, latent_channels=6, hidden_channels=32, channel_multipliers=(1, 2),
                 layers_per_block=1, n_fft=64, hop_length=16)  # fmt: skip


def _diffusion_decoder() -> nn.Module:
    return _made(
        diffusers.LTX2VideoDiffusionDecoderModel, latent_channels=6, decoder_head_dim=8,
        decoder_stage_channels=(64, 32, 16, 16, 8), decoder_stage_depths=(1, 1, 1, 1, 1),
        decoder_stage_kernels=((3, 3, 3),) * 4, decoder_stage5_kernel=(3, 3, 3), decoder_t_emb_dim=24,
        patch_size=1,
    )  # fmt: skip


def _mmaudio_vocoder() -> nn.Module:
    return _made(
        diffusers.MMAudioVocoder, num_mels=16, upsample_initial_channel=32, upsample_rates=(4, 2),
        upsample_kernel_sizes=(8, 4), resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),),
    )  # fmt: skip


def _minimax_vocoder() -> nn.Module:
    return _made(diffusers.MiniMaxMusic3Vocoder, latent_channels=6, decoder_input_dim=16, decoder_hidden_dim=32,
                 upsampling_ratios=(4, 2))  # fmt: skip


_TINY = AUTOENCODERS["tiny"]

CODERS: list[Coder] = [
    Coder("AsymmetricAutoencoderKL", _asymmetric, ((1, 3, 44, 24), (1, 3, 32, 24)), ((1, 4, 22, 12), (1, 4, 16, 12))),
    Coder("AutoencoderKLCosmos", _cosmos, ((1, 3, 9, 64, 48), (1, 3, 9, 48, 48)), ((1, 6, 2, 8, 6), (1, 6, 2, 6, 6))),
    Coder("AutoencoderKLHunyuanImage", _hunyuan_image, ((1, 3, 44, 24), (1, 3, 32, 24)),
          ((1, 8, 22, 12), (1, 8, 16, 12))),
    Coder("AutoencoderKLHunyuanImageRefiner", lambda: _hunyuan(diffusers.AutoencoderKLHunyuanImageRefiner),
          ((1, 3, 5, 96, 48), (1, 3, 5, 64, 48)), ((1, 4, 2, 6, 3), (1, 4, 2, 4, 3))),
    Coder("AutoencoderKLHunyuanVideo15", lambda: _hunyuan(diffusers.AutoencoderKLHunyuanVideo15),
          ((1, 3, 5, 96, 48), (1, 3, 5, 64, 48)), ((1, 4, 2, 6, 3), (1, 4, 2, 4, 3))),
    Coder("AutoencoderKLKVAE", _kvae, ((1, 3, 44, 24), (1, 3, 32, 24)), ((1, 4, 22, 12), (1, 4, 16, 12))),
    Coder("AutoencoderKLKVAEVideo", _kvae_video, ((1, 3, 5, 44, 24), (1, 3, 5, 32, 24)),
          ((1, 4, 2, 11, 6), (1, 4, 2, 8, 6))),
    Coder("AutoencoderKLKVAEAudio", _kvae_audio, ((1, 1, 320), (1, 1, 240)), ((1, 6, 40), (1, 6, 30))),
    Coder("AutoencoderKLLTX2Video", _ltx2, ((1, 3, 9, 160, 96), (1, 3, 9, 128, 96)),
          ((1, 6, 2, 5, 3), (1, 6, 2, 4, 3))),
    Coder("AutoencoderKLLTX2Audio", _ltx2_audio, ((1, 2, 44, 64), (1, 2, 32, 64)), ((1, 4, 11, 16), (1, 4, 8, 16))),
    Coder("AutoencoderKLMiniMaxH3", _minimax_h3, ((1, 3, 9, 44, 24), (1, 3, 9, 32, 24)),
          ((1, 6, 3, 11, 6), (1, 6, 3, 8, 6))),
    Coder("AutoencoderKLMiniMaxH3Audio", _minimax_h3_audio, ((1, 1, 320), (1, 1, 240)), ((1, 8, 40), (1, 8, 30))),
    Coder("AutoencoderKLQwenImage21", _qwen21, ((1, 3, 1, 44, 24), (1, 3, 1, 32, 24)),
          ((1, 6, 1, 11, 6), (1, 6, 1, 8, 6))),
    Coder("AutoencoderRAE", _rae, ((1, 3, 32, 32), (1, 3, 32, 32)), ((1, 64, 8, 8), (1, 64, 8, 8))),
    Coder("AutoencoderSAME", _same, ((1, 2, 320), (1, 2, 240)), ((1, 6, 40), (1, 6, 30))),
    Coder("AutoencoderTiny", _TINY.build, ((1, 3, 44, 24), (1, 3, 32, 24)), ((1, 4, 11, 6), (1, 4, 8, 6))),
    Coder("AutoencoderVidTok", _vidtok, ((1, 3, 5, 44, 24), (1, 3, 5, 32, 24)), ((1, 4, 2, 11, 6), (1, 4, 2, 8, 6))),
    Coder("ConsistencyDecoderVAE", _consistency, ((1, 3, 44, 24), (1, 3, 32, 24)), ((1, 4, 22, 12), (1, 4, 16, 12))),
    Coder("Cosmos3AVAEAudioTokenizer", _cosmos3_audio, ((1, 2, 320), (1, 2, 240)), ((1, 6, 40), (1, 6, 30))),
    Coder("Kandinsky6SRVAE", _kandinsky6, ((1, 3, 5, 64, 48), (1, 3, 5, 48, 48)), ((1, 6, 3, 8, 6), (1, 6, 3, 6, 6))),
    Coder("LongCatAudioDiTVae", _longcat_audio, ((1, 1, 320), (1, 1, 240)), ((1, 8, 40), (1, 8, 30))),
    Coder("MMAudioVAE", _mmaudio, ((1, 640), (1, 512)), ((1, 6, 20), (1, 6, 16))),
]  # fmt: skip

DECODERS: list[Alone] = [
    Alone("LTX2VideoDiffusionDecoderModel", _diffusion_decoder, partial(called, z=normal(6, 2, 3, 4)),
          {"z": {4: 3}}),
    Alone("MMAudioVocoder", _mmaudio_vocoder, partial(called, mel=normal(16, 40)), {"mel": {2: 30}}),
    Alone("MiniMaxMusic3Vocoder", _minimax_vocoder, partial(called, latents=normal(6, 40)), {"latents": {2: 30}}),
]  # fmt: skip
"""Those that only decode, by their call."""
