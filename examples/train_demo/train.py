"""Trains the demo pipeline from nothing: the autoencoder, then the denoiser with its text encoder.

    python examples/train_demo/train.py --work demo_run
    python examples/train_demo/train.py --work smoke_run --pipeline smoke_run/pipeline --smoke    # about a minute

Everything random comes from ``--seed``. A run that was stopped goes on from its last checkpoint in ``--work`` when the
same command is given again. See README.md beside this file for the times and figures of the committed weights.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import torch
from autoencoder import PHASES as AUTOENCODER_PHASES
from autoencoder import reconstruction_psnr, train_autoencoder
from curve import draw_curves
from denoiser import IMAGES, ROUNDS, train_denoiser
from diffusers import AutoencoderKL
from loop import Phase
from parts import save_pipeline

DEFAULT_PIPELINE = Path(__file__).resolve().parents[2] / "xdit_compile" / "cli" / "demo_pipeline"
SMOKE_AUTOENCODER = (Phase(64, 8, 20), Phase(128, 4, 5))
SMOKE_DENOISER = ((Phase(128, 8, 6),), (Phase(128, 8, 4), Phase(256, 2, 2)))
SMOKE_IMAGES = {128: 64, 256: 8}
MEGABYTE = 1e6


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), required=True, help="Checkpoints and logs.")
@click.option(
    "--pipeline", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_PIPELINE, show_default=True
)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default="all")
@click.option("--smoke", is_flag=True, help="A minute's run that shows that everything works; the pictures are noise.")
def main(work: Path, pipeline: Path, seed: int, threads: int, smoke: bool) -> None:
    """Train both parts and write the pipeline."""
    torch.set_num_threads(threads)
    vae = _autoencoder(work, seed, smoke)
    for side in (128, 256) if smoke else (128, 256, 512):
        print(f"autoencoder: {reconstruction_psnr(vae, seed + 99, side, 8 if smoke else 32):.1f} dB at {side} px")
    rounds, images = (SMOKE_DENOISER, SMOKE_IMAGES) if smoke else (ROUNDS, IMAGES)
    transformer, encoder = train_denoiser(work, vae, seed, rounds, images)
    size = save_pipeline(pipeline, vae, transformer, encoder)
    draw_curves(work, work / "loss.png")
    print(f"wrote {pipeline}: {size / MEGABYTE:.1f} MB; loss curves: {work / 'loss.png'}")


def _autoencoder(work: Path, seed: int, smoke: bool) -> AutoencoderKL:
    """The trained autoencoder; once finished it is kept, since the latents are made from it."""
    finished = work / "vae"
    if finished.is_dir():
        return AutoencoderKL.from_pretrained(finished)
    vae = train_autoencoder(work, seed, SMOKE_AUTOENCODER if smoke else AUTOENCODER_PHASES)
    vae.save_pretrained(finished)
    return vae


if __name__ == "__main__":
    main()
