"""Denoisers with the blocks of published models, as many as those have, and layers so narrow that computing is nothing.

What a call costs the host follows from the modules, weights and operators that there are, hardly from their sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from denoiser import places
from diffusers import FluxTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from torch import nn

Inputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Topology:
    """A module and one call of it.

    Args:
        about: what there is in it.
        stepping: the inputs that a scheduler makes anew for every step; the others stay the same tensors.
    """

    about: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    stepping: tuple[str, ...]

    def build(self) -> nn.Module:
        """A module of its own, with the same weights every time."""
        torch.manual_seed(0)
        return self.make().eval().requires_grad_(False)

    def step(self, given: Inputs) -> Inputs:
        """The inputs of another step."""
        return {**given, **{name: given[name].clone() for name in self.stepping}}


def _flux() -> nn.Module:
    return FluxTransformer2DModel(
        num_layers=19, num_single_layers=38, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=16, in_channels=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _flux_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(1, 64, 16), "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.full((1,), 0.7), "guidance": torch.full((1,), 3.5),
        "img_ids": places(64), "txt_ids": torch.zeros(8, 3), "return_dict": False,
    }  # fmt: skip


def _wan() -> nn.Module:
    return WanTransformer3DModel(
        num_layers=40, num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=64
    )


def _wan_inputs() -> Inputs:
    return {
        "hidden_states": torch.randn(1, 16, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 8, 32),
        "timestep": torch.full((1,), 700), "return_dict": False,
    }  # fmt: skip


def _sdxl() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16, 32), norm_num_groups=4, layers_per_block=2, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(1, 2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
    )  # fmt: skip


def _sdxl_inputs() -> Inputs:
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    return {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(700.0),
        "encoder_hidden_states": torch.randn(2, 8, 16), "added_cond_kwargs": added, "return_dict": False,
    }  # fmt: skip


TOPOLOGIES = {
    "FLUX": Topology("19 + 38 blocks", _flux, _flux_inputs, ("hidden_states", "timestep")),
    "Wan": Topology("40 blocks", _wan, _wan_inputs, ("hidden_states", "timestep")),
    "SDXL": Topology("U-Net of 70 blocks", _sdxl, _sdxl_inputs, ("sample", "timestep")),
}
