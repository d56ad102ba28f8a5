"""Trains the AutoencoderKL on drawn scenes, then scales its latents to mean 0 and deviation 1."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from loop import Phase, Training
from parts import make_autoencoder

from xdit_compile.evaluation.drawing import draw
from xdit_compile.evaluation.scenes import draw_scene

PHASES = (Phase(64, 12, 2000), Phase(128, 6, 700), Phase(256, 3, 150))
_NOISE = 0.05
_PENALTY = 1e-3
_MATCHED = 192


def pictures(seed: int, count: int, side: int, scene_side: int | None = None) -> torch.Tensor:
    """Random scenes as ``(count, 3, side, side)``, float32 from -1 to 1; of larger scenes a part with a thing."""
    rng = random.Random(seed)
    drawn = []
    for index in range(count):
        scene, _ = draw_scene(rng, 1 + (index % 2))
        image = draw(scene, scene_side or side)
        room = len(image) - side
        left, top = (
            min(max(round(at * len(image) - side * rng.uniform(0.2, 0.8)), 0), room) for at in scene.things[0].middle
        )
        drawn.append(image[top : top + side, left : left + side])
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_autoencoder(folder: Path, seed: int, phases: Sequence[Phase] = PHASES) -> AutoencoderKL:
    """Train, or go on from the last checkpoint; averaged weights with latents of mean 0 and deviation 1 come back."""
    torch.manual_seed(seed)
    vae = make_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    training = Training("autoencoder", folder, {"vae": vae}, [optimizer], [phases], average=0.998)

    def compute(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latent_dist.mean
            decoded = vae.decode(latents + _NOISE * noise).sample.float()
        error = decoded - images
        return error.abs().mean() + 2 * error.square().mean() + _PENALTY * latents.float().square().mean()

    def loss(phase: Phase, step: int) -> torch.Tensor:
        scene_side = max(phase.side, (128, 256, 256, 512)[step % 4]) if phase.side < 256 else 256
        images = pictures(seed * 1_000_003 + step, phase.batch, phase.side, scene_side)
        generator = torch.Generator().manual_seed(seed + step)
        side = phase.side // 8
        noise = torch.randn(phase.batch, vae.config.latent_channels, side, side, generator=generator)
        return compute(images.contiguous(memory_format=torch.channels_last), noise)

    training.run(loss)
    vae = make_autoencoder()
    vae.load_state_dict(training.averages["vae"])
    _standardise(vae.eval(), pictures(seed + 17, _MATCHED, phases[-1].side))
    return vae


@torch.no_grad()
def _standardise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Fold the latents' means and common scale into the two 1 x 1 convolutions around them."""
    channels = vae.config.latent_channels
    means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(16)])
    centre, scale = means.mean((0, 2, 3)), means.std()
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] /= scale
    encode.bias[:channels] = (encode.bias[:channels] - centre) / scale
    # The spread of the posterior is not used by the pipeline; one small constant keeps samples near their means.
    encode.weight[channels:] = 0
    encode.bias[channels:] = -10
    decode.bias += decode.weight[:, :, 0, 0] @ centre
    decode.weight *= scale


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, seed: int, side: int, count: int = 32) -> float:
    """Mean PSNR in dB of decoded against drawn images that training did not draw."""
    images = pictures(seed, count, side)
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(8)])
    error = (decoded.clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4
    return (-10 * error.log10()).mean().item()
