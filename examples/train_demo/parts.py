"""The components of the demo pipeline: real diffusers and transformers classes with small configurations."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from xdit_compile.evaluation.scenes import vocabulary

LATENT_SIDE = 32
LATENT_CHANNELS = 8
PIXELS_PER_LATENT = 8
TEXT_TOKENS = 32
TEXT_WIDTH = 128
HEADS, HEAD_WIDTH, BLOCKS = 6, 32, 8
HALF_PRECISION = ("transformer", "vae")


def make_tokenizer() -> T5Tokenizer:
    """One token a word; letters as a last resort, so that a word which training never saw still reads as something."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -2.0) for word in vocabulary()]
    pieces += [(letter, -12.0) for letter in ["▁", ",", ".", *letters] if ("▁" + letter, -2.0) not in pieces]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


def make_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer encoder, trained together with the denoiser."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def make_transformer() -> PixArtTransformer2DModel:
    """Eight blocks of width 192; 16 x 16 image tokens at the default size."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        num_layers=BLOCKS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        sample_size=LATENT_SIDE,
        patch_size=2,
        cross_attention_dim=TEXT_WIDTH,
        caption_channels=None,
        norm_num_groups=1,
        interpolation_scale=1,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def make_autoencoder() -> AutoencoderKL:
    """Eight pixels of a side become one latent; without attention, so that any size looks alike to it."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PIXELS_PER_LATENT * LATENT_SIDE,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ over the straight paths of flow matching."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0)


def save_pipeline(
    folder: Path, vae: AutoencoderKL, transformer: PixArtTransformer2DModel, text_encoder: T5EncoderModel
) -> int:
    """Write the pipeline and return its bytes. Large components are stored as float16 and load as float32."""
    pipe = PixArtSigmaPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=make_scheduler(),
    )
    for name in HALF_PRECISION:
        torch.nn.Module.to(getattr(pipe, name), torch.float16)
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder, safe_serialization=True)
    for name in HALF_PRECISION:
        torch.nn.Module.to(getattr(pipe, name), torch.float32)
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    return sum(file.stat().st_size for file in files)
