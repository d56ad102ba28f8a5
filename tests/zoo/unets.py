"""Tiny convolutional denoisers (and their control nets) with the inputs their pipelines pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn
from zoo.transformers import Case, Draw, Inputs

# ---- inputs


def unet(d: Draw, b: int, *, h: int, w: int, text: int, dim: int, pooled: int = 0, channels: int = 4) -> Inputs:
    """A latent, one timestep for all samples and text; ``pooled`` adds SDXL's pooled text and six sizes."""
    added = None
    if pooled:
        sizes = torch.tensor([8.0 * h, 8.0 * w, 0.0, 0.0, 8.0 * h, 8.0 * w]).expand(b, -1)
        added = {"text_embeds": d.normal(b, pooled), "time_ids": d.put(sizes.contiguous())}
    return (d.normal(b, channels, h, w), d.put(torch.tensor(701))), {
        "encoder_hidden_states": d.normal(b, text, dim),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": added,
        "return_dict": False,
    }


def unet_controlled(d: Draw, b: int, *, downs: Sequence[tuple[int, int, int]], **sizes: int) -> Inputs:
    """A UNet call with a control net's residuals: (channels, h, w) of each skip, the last one also for the middle."""
    args, kwargs = unet(d, b, **sizes)
    residuals = [d.normal(b, *shape) for shape in downs]
    middle = d.normal(b, *downs[-1])
    extra = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
    return args, {**kwargs, **extra}


def controlnet(d: Draw, b: int, *, h: int, w: int, text: int, dim: int) -> Inputs:
    return (d.normal(b, 4, h, w), d.put(torch.tensor(701))), {
        "encoder_hidden_states": d.normal(b, text, dim),
        "controlnet_cond": d.normal(b, 3, 8 * h, 8 * w),
        "conditioning_scale": 0.8,
        "guess_mode": False,
        "return_dict": False,
    }


def video_unet(d: Draw, b: int, *, frames: int, h: int, w: int, text: int, dim: int) -> Inputs:
    return (d.normal(b, 4, frames, h, w), d.put(torch.tensor(701))), {
        "encoder_hidden_states": d.normal(b, text, dim),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def motion_unet(d: Draw, b: int, *, frames: int, h: int, w: int, text: int, dim: int) -> Inputs:
    args, kwargs = video_unet(d, b, frames=frames, h=h, w=w, text=text, dim=dim)
    return args, {**kwargs, "encoder_hidden_states": d.normal(b * frames, text, dim)}


def spatio_temporal(d: Draw, b: int, *, frames: int, h: int, w: int, dim: int) -> Inputs:
    return (d.normal(b, frames, 8, h, w), d.put(torch.tensor(701.0))), {
        "encoder_hidden_states": d.normal(b, 1, dim),
        "added_time_ids": d.put(torch.tensor([[6.0, 127.0, 0.02]] * b)),
        "return_dict": False,
    }


def i2vgen(d: Draw, b: int, *, frames: int, h: int, w: int, text: int, dim: int) -> Inputs:
    return (d.normal(b, 4, frames, h, w), d.put(torch.tensor(701))), {
        "encoder_hidden_states": d.normal(b, text, dim),
        "fps": d.steps(b, 16),
        "image_latents": d.normal(b, 4, frames, h, w),
        "image_embeddings": d.normal(b, dim),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def kandinsky3(d: Draw, b: int, *, h: int, w: int, text: int, lengths: Sequence[int], dim: int) -> Inputs:
    return (d.normal(b, 4, h, w), d.put(torch.tensor(701))), {
        "encoder_hidden_states": d.normal(b, text, dim),
        "encoder_attention_mask": d.mask([lengths[i % len(lengths)] for i in range(b)], text),
        "return_dict": False,
    }


def cascade(d: Draw, b: int, *, h: int, w: int, pooled: int, text: int, dim: int) -> Inputs:
    return (), {
        "sample": d.normal(b, 6, h, w),
        "timestep_ratio": d.full(b, 0.7),
        "clip_text_pooled": d.normal(b, 1, pooled),
        "clip_text": d.normal(b, text, dim),
        "clip_img": d.normal(b, 1, 26),
        "return_dict": False,
    }


# ---- models


def _unet(**config: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "sample_size": 24, "layers_per_block": 1, "block_out_channels": (20, 40), "norm_num_groups": 5,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 28, "attention_head_dim": 5,
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**{**sizes, **config})


def _unet_xl() -> nn.Module:
    return _unet(
        block_out_channels=(20, 40, 60), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4, 5),
        transformer_layers_per_block=(1, 2, 3), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=22 + 6 * 8,
    )  # fmt: skip


def _controlnet() -> nn.Module:
    return diffusers.ControlNetModel(
        block_out_channels=(20, 40), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        norm_num_groups=5, cross_attention_dim=28, attention_head_dim=5,
        conditioning_embedding_out_channels=(6, 8, 10, 12),
    )  # fmt: skip


def _unet3d() -> nn.Module:
    return diffusers.UNet3DConditionModel(
        sample_size=14, block_out_channels=(20, 40), layers_per_block=1, norm_num_groups=5, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=28,
    )  # fmt: skip


def _motion() -> nn.Module:
    return diffusers.UNetMotionModel(
        sample_size=14, block_out_channels=(20, 40), layers_per_block=1, norm_num_groups=5, num_attention_heads=5,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), cross_attention_dim=28,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), motion_num_attention_heads=5,
    )  # fmt: skip


def _spatio_temporal() -> nn.Module:
    return diffusers.UNetSpatioTemporalConditionModel(
        sample_size=14, block_out_channels=(32, 64), layers_per_block=1, num_attention_heads=(2, 4), num_frames=5,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), cross_attention_dim=28,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )  # fmt: skip


def _i2vgen() -> nn.Module:
    return diffusers.I2VGenXLUNet(
        sample_size=14, block_out_channels=(20, 40), layers_per_block=1, norm_num_groups=5, num_attention_heads=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=28, attention_head_dim=4,
    )  # fmt: skip


def _kandinsky3() -> nn.Module:
    return diffusers.Kandinsky3UNet(
        time_embedding_dim=24, groups=2, attention_head_dim=4, layers_per_block=2, block_out_channels=(20, 40),
        cross_attention_dim=30, encoder_hid_dim=28,
    )  # fmt: skip


def _cascade() -> nn.Module:
    block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    return diffusers.models.StableCascadeUNet(
        in_channels=6, out_channels=6, timestep_ratio_embedding_dim=8, conditioning_dim=30, block_out_channels=(20, 40),
        num_attention_heads=(5, 5), down_num_layers_per_block=(1, 2), up_num_layers_per_block=(2, 1),
        block_types_per_layer=(block, block), clip_text_in_channels=28, clip_text_pooled_in_channels=22,
        clip_image_in_channels=26, clip_seq=3,
    )  # fmt: skip


_SIZES: dict[str, Any] = {"h": 14, "w": 22, "text": 13, "dim": 28}
_VIDEO: dict[str, Any] = {"frames": 5, "h": 10, "w": 14, "text": 13, "dim": 28}
_SKIPS = ((20, 14, 22), (20, 14, 22), (20, 7, 11), (40, 7, 11))

_CASES = [
    Case("unet_sd15", _unet, partial(unet, **_SIZES)),
    Case("unet_sd15_odd", _unet, partial(unet, **{**_SIZES, "h": 13, "w": 21})),
    Case("unet_sd15_controlled", _unet, partial(unet_controlled, downs=_SKIPS, **_SIZES)),
    Case("unet_sdxl", _unet_xl, partial(unet, pooled=22, **{**_SIZES, "h": 12, "w": 20})),
    Case("unet_controlnet", _controlnet, partial(controlnet, **_SIZES), reach=0.05),
    Case("unet_3d", _unet3d, partial(video_unet, **_VIDEO)),
    Case("unet_motion", _motion, partial(motion_unet, **_VIDEO)),
    Case("unet_spatio_temporal", _spatio_temporal, partial(spatio_temporal, frames=5, h=10, w=14, dim=28)),
    Case("unet_i2vgen", _i2vgen, partial(i2vgen, **_VIDEO)),
    Case("unet_kandinsky3", _kandinsky3, partial(kandinsky3, lengths=(9, 13), **_SIZES)),
    Case("unet_cascade", _cascade, partial(cascade, h=14, w=22, pooled=22, text=13, dim=28)),
]

UNETS: dict[str, Case] = {case.name: case for case in _CASES}
