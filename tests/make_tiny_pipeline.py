"""Makes the tiny text-to-image pipeline that the tests load, in the folder format of diffusers.

Every part is the real class with a tiny configuration and seeded random weights, so ``from_pretrained`` loads the
folder as it loads any other. The default picture is 256 x 256 pixels: 256 image tokens beside the text tokens.

    python tests/make_tiny_pipeline.py [FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

DEFAULT_FOLDER = Path(__file__).resolve().parent / "data" / "tiny_pipeline"
SEED = 20240
TEXT_TOKENS = 32
TEXT_WIDTH = 32
LATENT_SIZE = 32
LATENT_CHANNELS = 4
CORPUS = (
    "a photo of a red fox in the snow at night",
    "a painting of a lighthouse at dusk over the stormy sea",
    "an astronaut riding a horse on the moon in the style of a woodcut",
    "a small house with a garden and a blue door under a bright sky",
    "two cats and a dog sleeping on a green sofa by the window",
    "a city street in the rain with yellow lights and people walking home",
    "mountains and a river in autumn with orange trees and low clouds",
    "a bowl of fruit on a wooden table, still life, soft light, high detail",
    "a white boat on a calm lake in the morning mist, wide angle",
    "portrait of an old sailor with a grey beard, oil on canvas",
)
START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE tokenizer: every byte, alone and at a word's end, and the merges learnt from ``CORPUS``."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=700, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(CORPUS, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(alphabet + [letter + "</w>" for letter in alphabet] + [a + b for a, b in merges])
    vocabulary = {token: index for index, token in enumerate([*tokens, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_TOKENS)


def make_text_encoder(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextModelWithProjection:
    """A text encoder that fits the tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def make_long_text_encoder(tokenizer: CLIPTokenizer) -> T5EncoderModel:
    """The third text encoder, as wide as the other two together."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=2 * TEXT_WIDTH,
        d_kv=16,
        d_ff=2 * TEXT_WIDTH,
        num_layers=1,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def make_pipeline(seed: int = SEED) -> StableDiffusion3Pipeline:
    """The whole pipeline in float32; the same seed gives the same weights."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=48,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=8 * LATENT_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(6.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, layers=2),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(tokenizer, layers=2),
        tokenizer_2=tokenizer,
        text_encoder_3=make_long_text_encoder(tokenizer),
        tokenizer_3=tokenizer,
    )


def main() -> None:
    """Write the folder anew; weights are stored as float16 to keep the folder small."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER)
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    make_pipeline().to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"wrote {folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
