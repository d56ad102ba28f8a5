"""Trains the denoiser and its text encoder together, by flow matching on the autoencoder's latents of drawn scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from loop import Phase, Training
from parts import make_text_encoder, make_tokenizer, make_transformer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import T5EncoderModel

from xdit_compile.evaluation.drawing import draw
from xdit_compile.evaluation.scenes import phrase, training_scenes

ROUNDS = (
    (Phase(128, 64, 1500), Phase(256, 24, 480), *(Phase(256, 24, 14), Phase(512, 6, 1)) * 25),
    (Phase(128, 64, 1700), Phase(256, 24, 1000), *(Phase(256, 24, 14), Phase(512, 6, 1)) * 50),
)
IMAGES = {128: 24_000, 256: 7_000, 512: 400}
_CAPTIONS = 4
_LONGEST = 24
_UNCONDITIONAL_SHARE = 0.1
_SHIFT = 2.0
_NO_CONDITIONS = {"resolution": None, "aspect_ratio": None}


class Latents:
    """Latents of drawn scenes at one side, each with several captions as token ids; kept in a file."""

    def __init__(self, folder: Path, vae: AutoencoderKL, seed: int, side: int, count: int):
        path = folder / f"latents_{side}_{count}.safetensors"
        if not path.is_file():
            save_file(_encode(vae, seed, side, count), path)
        stored = load_file(path)
        self._latents, self._tokens = stored["latents"], stored["tokens"]

    def batch(self, generator: torch.Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random latents ``(size, channels, side, side)`` and token ids ``(size, tokens)``, some empty."""
        chosen = torch.randint(len(self._latents), (size,), generator=generator)
        which = torch.randint(_CAPTIONS, (size,), generator=generator)
        tokens = self._tokens[chosen, which].long()
        dropped = torch.rand(size, generator=generator) < _UNCONDITIONAL_SHARE
        empty = torch.zeros_like(tokens[0])
        empty[0] = 1
        return self._latents[chosen].float(), torch.where(dropped[:, None], empty, tokens)


def train_denoiser(
    folder: Path,
    vae: AutoencoderKL,
    seed: int,
    rounds: Sequence[Sequence[Phase]] = ROUNDS,
    images: dict[int, int] = IMAGES,
) -> tuple[PixArtTransformer2DModel, T5EncoderModel]:
    """Train, or go on from the last checkpoint; the averaged weights come back."""
    torch.manual_seed(seed)
    transformer, encoder = make_transformer(), make_text_encoder(make_tokenizer())
    sides = sorted({phase.side for phases in rounds for phase in phases})
    data = {side: Latents(folder, vae, seed, side, images[side]) for side in sides}
    training = Training(
        "denoiser",
        folder,
        {"transformer": transformer, "text_encoder": encoder},
        _optimizers(transformer, encoder),
        rounds,
        average=0.998,
    )

    def compute(noisy: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(_attention(noisy.shape[-1])):
            return transformer(
                noisy,
                encoder_hidden_states=text,
                encoder_attention_mask=mask,
                timestep=1000 * sigma,
                added_cond_kwargs=_NO_CONDITIONS,
                return_dict=False,
            )[0]

    compiled = torch.compile(compute, dynamic=False)

    def loss(phase: Phase, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        latents, tokens = data[phase.side].batch(generator, phase.batch)
        mask = (tokens != 0).float()
        noise = torch.randn(latents.shape, generator=generator)
        uniform = torch.sigmoid(torch.randn(phase.batch, generator=generator))
        sigma = _SHIFT * uniform / (1 + (_SHIFT - 1) * uniform)
        share = sigma[:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            text = encoder(tokens, attention_mask=mask)[0]
            velocity = compiled((1 - share) * latents + share * noise, sigma, text, mask)
        return (velocity.float() - (noise - latents)).square().mean()

    training.run(loss)
    transformer.load_state_dict(training.averages["transformer"])
    encoder.load_state_dict(training.averages["text_encoder"])
    return transformer.eval(), encoder.eval()


def _attention(latent_side: int) -> SDPBackend:
    """The faster kernel on a CPU, backward included."""
    return SDPBackend.MATH if latent_side >= 32 else SDPBackend.FLASH_ATTENTION


def _optimizers(transformer: nn.Module, encoder: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [
        value for name, value in transformer.named_parameters() if "blocks." in name and name.endswith("weight")
    ]
    taken = {id(value) for value in matrices}
    rest = [value for module in (transformer, encoder) for value in module.parameters() if id(value) not in taken]
    return [
        torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1.5e-3, betas=(0.9, 0.97), weight_decay=0.0),
    ]


@torch.no_grad()
def _encode(vae: AutoencoderKL, seed: int, side: int, count: int) -> dict[str, torch.Tensor]:
    scenes, tokenizer, rng = training_scenes(seed * 7 + side), make_tokenizer(), random.Random(seed + side)
    size = max(16 * 128 * 128 // side**2, 1)
    latents, captions = [], []
    encode = torch.compile(lambda images: vae.encode(images).latent_dist.mean, dynamic=False)
    for start in tqdm(range(0, count, size), desc=f"latents of {side} px", mininterval=10):
        drawn = []
        for scene, request in (next(scenes) for _ in range(min(size, count - start))):
            drawn.append(draw(scene, side))
            captions += [phrase(rng, request) for _ in range(_CAPTIONS)]
        images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents.append((encode if len(images) == size else lambda x: vae.encode(x).latent_dist.mean)(images).half())
    tokens = tokenizer(captions, padding="max_length", max_length=_LONGEST, return_tensors="pt").input_ids
    assert tokens.shape[1] == _LONGEST, "a caption is longer than the room kept for it"
    return {"latents": torch.cat(latents).contiguous(), "tokens": tokens.view(count, _CAPTIONS, -1).to(torch.uint8)}
