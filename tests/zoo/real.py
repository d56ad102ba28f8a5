"""The named denoisers with their published layer sizes and input sizes, without weights (``meta`` device).

Sizes are those of the published configurations; images are 1024 x 1024 (DiT: 512 x 512) and videos have the
size that the model's documentation uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn
from zoo.transformers import (
    Draw,
    Inputs,
    cogvideox,
    dit,
    flux,
    flux2,
    hunyuandit,
    latte,
    lumina2,
    mochi,
    pixart,
    qwenimage,
    randomise,
    sana,
    sd3,
    wan,
    zimage,
)


@dataclass(frozen=True)
class RealCase:
    """A model at its real size. ``depth`` names the block counts of its configuration, which ``blocks`` lowers.

    ``eager_on_meta`` is false where the forward pass reads values of its mask, which ``meta`` tensors do not have;
    ``small`` then lists the sizes of an input that two blocks on a CPU can take.
    """

    name: str
    model: Callable[..., nn.Module]
    config: dict[str, Any]
    depth: dict[str, int]
    feed: Callable[[Draw, int], Inputs]
    batch: int = 2
    eager_on_meta: bool = True
    small: dict[str, Any] = field(default_factory=dict)

    def build(self, blocks: int | None = None, device: str = "meta", dtype: torch.dtype = torch.float32) -> nn.Module:
        """The module in eval mode; at most ``blocks`` blocks of each kind. On a real device the weights are drawn."""
        depth = {key: count if blocks is None else min(blocks, count) for key, count in self.depth.items()}
        with torch.device(device):
            model = self.model(**self.config, **depth).eval()
        if dtype is not torch.float32:
            model = model.to(dtype)
        if device != "meta":
            randomise(model)
        return model.requires_grad_(False)

    def inputs(self, seed: int = 0, batch: int | None = None, device: str = "meta",
               dtype: torch.dtype = torch.float32, small: bool = False) -> Inputs:  # fmt: skip
        """Positional and keyword arguments of one call, floats that carry activations in ``dtype``."""
        feed = partial(self.feed, **self.small) if small else self.feed
        return feed(Draw(seed, device, dtype), batch or self.batch)


_SD3 = partial(sd3, h=128, w=128, text=333, channels=16, dim=4096, pooled=2048)
_SD3_CONFIG = {"sample_size": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
_COGVIDEOX = partial(cogvideox, channels=16, dim=4096)
_WAN = partial(wan, frames=21, h=60, w=104, text=512, channels=16, dim=4096)

_CASES = [
    RealCase(
        "flux",
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True},
        {"num_layers": 19, "num_single_layers": 38},
        partial(flux, h=64, w=64, text=512, channels=64, dim=4096, pooled=768, guided=True),
        1,
    ),
    RealCase(
        "flux2",
        diffusers.Flux2Transformer2DModel,
        {},
        {"num_layers": 8, "num_single_layers": 48},
        partial(flux2, h=64, w=64, text=512, channels=128, dim=15360),
        1,
    ),
    RealCase(
        "sd3",
        diffusers.SD3Transformer2DModel,
        {**_SD3_CONFIG, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        {"num_layers": 24},
        _SD3,
    ),
    RealCase(
        "sd3_5_medium",
        diffusers.SD3Transformer2DModel,
        {
            **_SD3_CONFIG,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },  # fmt: skip
        {"num_layers": 24},
        _SD3,
    ),
    RealCase(
        "sd3_5_large",
        diffusers.SD3Transformer2DModel,
        {
            **_SD3_CONFIG,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },  # fmt: skip
        {"num_layers": 38},
        _SD3,
    ),
    RealCase(
        "pixart",
        diffusers.PixArtTransformer2DModel,
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False},
        {"num_layers": 28},
        partial(pixart, h=128, w=128, lengths=(300, 300), text=300, channels=4, dim=4096),
    ),
    RealCase(
        "hunyuandit",
        diffusers.HunyuanDiT2DModel,
        {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 128,
            "hidden_size": 1408,
            "mlp_ratio": 4.3637,
            "use_style_cond_and_image_meta_size": False,
        },  # fmt: skip
        {"num_layers": 40},
        partial(
            hunyuandit,
            h=128,
            w=128,
            text=77,
            text_t5=256,
            channels=4,
            dim=1024,
            dim_t5=2048,
            head_dim=88,
            lengths=(77,),
            lengths_t5=(256,),
        ),  # fmt: skip
    ),
    RealCase(
        "cogvideox_2b",
        diffusers.CogVideoXTransformer3DModel,
        {},
        {"num_layers": 30},
        partial(_COGVIDEOX, frames=13, h=60, w=90, text=226),
    ),
    RealCase(
        "cogvideox_5b",
        diffusers.CogVideoXTransformer3DModel,
        {"num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        {"num_layers": 42},
        partial(_COGVIDEOX, frames=13, h=60, w=90, text=226, head_dim=64),
    ),
    RealCase(
        "cogvideox_1_5",
        diffusers.CogVideoXTransformer3DModel,
        {
            "num_attention_heads": 48,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "sample_height": 96,
            "sample_width": 170,
            "sample_frames": 81,
            "max_text_seq_length": 224,
        },  # fmt: skip
        {"num_layers": 42},
        partial(_COGVIDEOX, frames=22, h=96, w=170, text=224, head_dim=64, patch_t=2, sliced=True),
    ),
    RealCase(
        "latte",
        diffusers.LatteTransformer3DModel,
        {
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 1152,
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 1000,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 4096,
        },  # fmt: skip
        {"num_layers": 28},
        partial(latte, frames=16, h=64, w=64, text=120, channels=4, dim=4096),
    ),
    RealCase(
        "mochi",
        diffusers.MochiTransformer3DModel,
        {},
        {"num_layers": 48},
        partial(mochi, frames=15, h=60, w=106, text=256, lengths=(256,), channels=12, dim=4096),
        eager_on_meta=False,
        small={"frames": 3, "h": 18, "w": 30, "text": 64, "lengths": (64,)},
    ),
    RealCase(
        "dit",
        diffusers.DiTTransformer2DModel,
        {"sample_size": 64, "out_channels": 8},
        {"num_layers": 28},
        partial(dit, size=64, channels=4, classes=1000),
    ),
    RealCase("wan_t2v", diffusers.WanTransformer3DModel, {}, {"num_layers": 40}, _WAN, 1),
    RealCase(
        "wan_i2v",
        diffusers.WanTransformer3DModel,
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        {"num_layers": 40},
        partial(_WAN, channels=36, image=257, image_dim=1280),
        1,
    ),
    RealCase(
        "qwenimage",
        diffusers.QwenImageTransformer2DModel,
        {},
        {"num_layers": 60},
        partial(qwenimage, h=64, w=64, text=256, channels=64, dim=3584),
        1,
    ),
    RealCase(
        "sana",
        diffusers.SanaTransformer2DModel,
        {},
        {"num_layers": 20},
        partial(sana, h=32, w=32, text=300, lengths=(300,), channels=32, dim=2304),
    ),
    RealCase(
        "lumina2",
        diffusers.Lumina2Transformer2DModel,
        {"cap_feat_dim": 2304},
        {"num_layers": 26, "num_refiner_layers": 2},
        partial(lumina2, h=128, w=128, text=256, lengths=(256,), channels=16, dim=2304),
        1,
        eager_on_meta=False,
        small={"h": 34, "w": 62, "text": 64, "lengths": (64,)},
    ),
    RealCase(
        "zimage",
        diffusers.ZImageTransformer2DModel,
        {"axes_lens": [1536, 512, 512]},
        {"n_layers": 30, "n_refiner_layers": 2},
        partial(zimage, h=128, w=128, lengths=(96,), channels=16, dim=2560),
        1,
    ),
]

REAL: dict[str, RealCase] = {case.name: case for case in _CASES}
