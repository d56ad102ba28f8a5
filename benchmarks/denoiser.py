"""The denoiser that every contender runs: one diffusers class that has a native context-parallel plan."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

CHANNELS, TEXT_WIDTH, POOLED = 64, 512, 256


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of one measurement; ``blocks`` counts double and single blocks together, half of each."""

    hidden: int = 512
    blocks: int = 8
    tokens: int = 1024
    text: int = 64
    head_dim: int = 64
    batch: int = 1

    def __post_init__(self) -> None:
        if math.isqrt(self.tokens) ** 2 != self.tokens:
            raise ValueError(f"tokens={self.tokens} must be a square: the image is one")
        if self.hidden % self.head_dim or self.head_dim % 4:
            raise ValueError(f"hidden={self.hidden} must be a multiple of head_dim={self.head_dim}, and that one of 4")

    def build(self) -> nn.Module:
        """A module of its own."""
        return build(self)

    def like(self, model: nn.Module) -> nn.Module:
        """Another module tree over the same weights."""
        return like(model, self)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of one call."""
        return inputs(self)

    def title(self) -> str:
        """The sizes in words."""
        return f"{self.blocks} blocks, {self.hidden} hidden, {self.tokens} + {self.text} tokens, batch {self.batch}"


def build(size: Size, seed: int = 0) -> nn.Module:
    """The denoiser in fp32 with weights drawn from ``seed``."""
    torch.manual_seed(seed)
    rotary = size.head_dim * 3 // 8 // 2 * 2
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=size.blocks - size.blocks // 2,
        num_single_layers=size.blocks // 2,
        attention_head_dim=size.head_dim,
        num_attention_heads=size.hidden // size.head_dim,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(size.head_dim - 2 * rotary, rotary, rotary),
    )
    return model.eval().requires_grad_(False)


def like(model: nn.Module, size: Size) -> nn.Module:
    """Another module tree over the same weights."""
    other = build(size)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.requires_grad_(False)


def inputs(size: Size, seed: int = 1) -> dict[str, Any]:
    """Keyword arguments of one call, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(size.batch, size.tokens, CHANNELS, generator=generator),
        "encoder_hidden_states": torch.randn(size.batch, size.text, TEXT_WIDTH, generator=generator),
        "pooled_projections": torch.randn(size.batch, POOLED, generator=generator),
        "timestep": torch.full((size.batch,), 0.7),
        "guidance": torch.full((size.batch,), 3.5),
        "img_ids": places(size.tokens),
        "txt_ids": torch.zeros(size.text, 3),
        "return_dict": False,
    }


def places(tokens: int) -> torch.Tensor:
    """Where the tokens of a square picture stand, [tokens, 3], fp32."""
    side = math.isqrt(tokens)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()
