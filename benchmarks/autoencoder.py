"""The autoencoder that every contender runs: the architecture of Stable Diffusion's, random weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
SCALE = 8
"""Pixels along one side of what a latent stands for."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A square picture of ``side`` pixels that is decoded."""

    side: int = 256

    def __post_init__(self) -> None:
        if self.side < SCALE or self.side % SCALE:
            raise ValueError(f"side={self.side} must be a multiple of {SCALE}")

    def build(self) -> nn.Module:
        """The autoencoder in fp32, the same on every process."""
        torch.manual_seed(0)
        return AutoencoderKL(**CONFIG).eval().requires_grad_(False)

    def like(self, model: nn.Module) -> nn.Module:
        """Another module tree over the same weights."""
        with torch.device("meta"):
            other = AutoencoderKL(**CONFIG).eval()
        other.load_state_dict(model.state_dict(), assign=True)
        return other.requires_grad_(False)

    def latent(self, device: str = "cpu") -> torch.Tensor:
        """(1, 4, side / 8, side / 8)."""
        side = self.side // SCALE
        if device != "cpu":
            return torch.empty(1, 4, side, side, device=device)
        return torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of ``decode``."""
        return {"z": self.latent(), "return_dict": False}

    def title(self) -> str:
        """The size in words."""
        return f"decoding {self.side} x {self.side} pixels"
