"""Tiny diffusers denoisers with the inputs their pipelines pass.

Counts are chosen so that wrong axes show: five heads, 7 x 11 image patches, 13 text tokens, and sizes that differ from
one dimension to the next. Every weight is drawn anew, so that gates and output layers that start at zero matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_3d_rotary_pos_embed
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Draw:
    """A source of example tensors: seeded values on the CPU, or shapes without values on ``meta``."""

    def __init__(self, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values of ``shape``."""
        if self.device == "meta":
            return torch.empty(shape, device="meta", dtype=self.dtype)
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def full(self, batch: int, value: float) -> Tensor:
        """``value`` for each of ``batch`` samples, float."""
        return torch.full((batch,), float(value), device=self.device, dtype=torch.float32)

    def steps(self, batch: int, value: int) -> Tensor:
        """An integer timestep for each of ``batch`` samples, int64."""
        return torch.full((batch,), value, device=self.device, dtype=torch.int64)

    def mask(self, lengths: Sequence[int], total: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """(batch, total) with ones on the first ``lengths[i]`` tokens, as tokenizers give it."""
        return (torch.arange(total)[None] < torch.tensor(lengths)[:, None]).to(self.device, dtype)

    def put(self, *tensors: Tensor) -> Any:
        """Tensors made on the CPU, moved to this device."""
        moved = tuple(tensor.to(self.device) for tensor in tensors)
        return moved[0] if len(moved) == 1 else moved


@dataclass(frozen=True)
class Case:
    """A model and the call its pipeline makes.

    ``make`` constructs the module, ``feed`` draws inputs for a batch size; ``batch`` is the one the pipeline uses (2
    where guidance doubles it). ``idle`` names tensor inputs that need not change the output, with the reason.
    ``reach`` is the least share of a sample's output that follows one number of its input: below 1 where
    convolutions see only so far. ``lengths`` names streams of padded tokens whose valid lengths are not given as a
    mask, with those of each sample.
    """

    name: str
    make: Callable[[], nn.Module]
    feed: Callable[[Draw, int], Inputs]
    batch: int = 2
    idle: tuple[tuple[str, str], ...] = ()
    reach: float = 0.9
    lengths: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def build(self, seed: int = 0) -> nn.Module:
        """The module in eval mode, fp32, every parameter drawn from ``seed``."""
        model = self.make().eval().float()
        randomise(model, seed)
        return model.requires_grad_(False)

    def inputs(self, seed: int = 0, batch: int | None = None, device: str = "cpu") -> Inputs:
        """Positional and keyword arguments of one call."""
        return self.feed(Draw(seed, device), batch or self.batch)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw every parameter: weights by fan-in, norms about one, biases and tables small but never zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(_scaled(module, name, parameter.detach(), draw))


def _scaled(module: nn.Module, name: str, initial: Tensor, draw: Tensor) -> Tensor:
    if isinstance(module, nn.Embedding):
        return draw
    if bool((initial == 1).all()):
        return 1 + 0.2 * draw
    if name.endswith("weight") and draw.ndim >= 2:
        scaled_in_forward = isinstance(getattr(module, "scale", None), float)
        return draw if scaled_in_forward else draw / math.sqrt(max(draw[0].numel(), 1))
    return (0.5 if draw.ndim >= 2 else 0.1) * draw


# ---- what the pipelines pass: each function takes a Draw, a batch and sizes


def image_ids(height: int, width: int) -> Tensor:
    """(height * width, 3): zero, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


def flux(d: Draw, b: int, *, h: int, w: int, text: int, channels: int, dim: int, pooled: int, guided: bool) -> Inputs:
    return (), {
        "hidden_states": d.normal(b, h * w, channels),
        "timestep": d.full(b, 0.7),
        "guidance": d.full(b, 3.5) if guided else None,
        "pooled_projections": d.normal(b, pooled),
        "encoder_hidden_states": d.normal(b, text, dim),
        "txt_ids": d.put(torch.zeros(text, 3)),
        "img_ids": d.put(image_ids(h, w)),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def flux2(d: Draw, b: int, *, h: int, w: int, text: int, channels: int, dim: int) -> Inputs:
    none = torch.arange(1)
    img_ids = torch.cartesian_prod(none, torch.arange(h), torch.arange(w), none)
    txt_ids = torch.cartesian_prod(none, none, none, torch.arange(text))
    return (), {
        "hidden_states": d.normal(b, h * w, channels),
        "timestep": d.full(b, 0.7),
        "guidance": d.full(b, 3.5),
        "encoder_hidden_states": d.normal(b, text, dim),
        "txt_ids": d.put(txt_ids.expand(b, -1, -1)),
        "img_ids": d.put(img_ids.expand(b, -1, -1)),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def sd3(d: Draw, b: int, *, h: int, w: int, text: int, channels: int, dim: int, pooled: int) -> Inputs:
    return (), {
        "hidden_states": d.normal(b, channels, h, w),
        "timestep": d.full(b, 700.0),
        "encoder_hidden_states": d.normal(b, text, dim),
        "pooled_projections": d.normal(b, pooled),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def pixart(d: Draw, b: int, *, h: int, w: int, lengths: Sequence[int], text: int, channels: int, dim: int,
           micro: bool = False) -> Inputs:  # fmt: skip
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if micro:
        sizes = {"resolution": d.put(torch.tensor([[8.0 * h, 8.0 * w]] * b)), "aspect_ratio": d.full(b, h / w)[:, None]}
    return (d.normal(b, channels, h, w),), {
        "encoder_hidden_states": d.normal(b, text, dim),
        "encoder_attention_mask": d.mask(_cycle(lengths, b), text),
        "timestep": d.steps(b, 701),
        "added_cond_kwargs": sizes,
        "return_dict": False,
    }


def hunyuandit(d: Draw, b: int, *, h: int, w: int, text: int, text_t5: int, channels: int, dim: int, dim_t5: int,
               head_dim: int, lengths: Sequence[int], lengths_t5: Sequence[int]) -> Inputs:  # fmt: skip
    rotary = get_2d_rotary_pos_embed(head_dim, ((0, 0), (h // 2, w // 2)), (h // 2, w // 2), output_type="pt")
    size = [8.0 * h, 8.0 * w, 8.0 * h, 8.0 * w, 0.0, 0.0]
    return (d.normal(b, channels, h, w), d.full(b, 701.0)), {
        "encoder_hidden_states": d.normal(b, text, dim),
        "text_embedding_mask": d.mask(_cycle(lengths, b), text),
        "encoder_hidden_states_t5": d.normal(b, text_t5, dim_t5),
        "text_embedding_mask_t5": d.mask(_cycle(lengths_t5, b), text_t5),
        "image_meta_size": d.put(torch.tensor([size] * b)),
        "style": d.steps(b, 0),
        "image_rotary_emb": d.put(*rotary),
        "return_dict": False,
    }


def cogvideox(d: Draw, b: int, *, frames: int, h: int, w: int, text: int, channels: int, dim: int,
              head_dim: int = 0, patch_t: int = 1, sliced: bool = False, ofs: bool = False) -> Inputs:  # fmt: skip
    grid = (h // 2, w // 2)
    rotary = None
    if head_dim and sliced:
        rotary = get_3d_rotary_pos_embed(head_dim, None, grid, frames // patch_t, grid_type="slice", max_size=grid)
    elif head_dim:
        rotary = get_3d_rotary_pos_embed(head_dim, ((0, 0), grid), grid, frames)
    kwargs: dict[str, Any] = {
        "hidden_states": d.normal(b, frames, channels, h, w),
        "encoder_hidden_states": d.normal(b, text, dim),
        "timestep": d.steps(b, 701),
        "image_rotary_emb": None if rotary is None else d.put(*rotary),
        "attention_kwargs": None,
        "return_dict": False,
    }
    return (), {**kwargs, "ofs": d.full(1, 2.0)} if ofs else kwargs


def latte(d: Draw, b: int, *, frames: int, h: int, w: int, text: int, channels: int, dim: int) -> Inputs:
    return (), {
        "hidden_states": d.normal(b, channels, frames, h, w),
        "encoder_hidden_states": d.normal(b, text, dim),
        "timestep": d.steps(b, 701),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def mochi(d: Draw, b: int, *, frames: int, h: int, w: int, text: int, lengths: Sequence[int], channels: int,
          dim: int) -> Inputs:  # fmt: skip
    return (), {
        "hidden_states": d.normal(b, channels, frames, h, w),
        "encoder_hidden_states": d.normal(b, text, dim),
        "timestep": d.full(b, 701.0),
        "encoder_attention_mask": d.mask(_cycle(lengths, b), text, torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def dit(d: Draw, b: int, *, size: int, channels: int, classes: int) -> Inputs:
    labels = torch.tensor([3 % classes] * (b // 2) + [classes] * (b - b // 2))
    return (d.normal(b, channels, size, size),), {"timestep": d.steps(b, 701), "class_labels": d.put(labels)}


def wan(d: Draw, b: int, *, frames: int, h: int, w: int, text: int, channels: int, dim: int, image: int = 0,
        image_dim: int = 0) -> Inputs:  # fmt: skip
    kwargs: dict[str, Any] = {
        "hidden_states": d.normal(b, channels, frames, h, w),
        "timestep": d.steps(b, 701),
        "encoder_hidden_states": d.normal(b, text, dim),
        "attention_kwargs": None,
        "return_dict": False,
    }
    return (), {**kwargs, "encoder_hidden_states_image": d.normal(b, image, image_dim)} if image else kwargs


def qwenimage(d: Draw, b: int, *, h: int, w: int, text: int, channels: int, dim: int,
              lengths: Sequence[int] = ()) -> Inputs:  # fmt: skip
    return (), {
        "hidden_states": d.normal(b, h * w, channels),
        "timestep": d.full(b, 0.7),
        "guidance": None,
        "encoder_hidden_states_mask": d.mask(_cycle(lengths, b), text, torch.bool) if lengths else None,
        "encoder_hidden_states": d.normal(b, text, dim),
        "img_shapes": [[(1, h, w)]] * b,
        "attention_kwargs": {},
        "return_dict": False,
    }


def sana(d: Draw, b: int, *, h: int, w: int, text: int, lengths: Sequence[int], channels: int, dim: int) -> Inputs:
    return (d.normal(b, channels, h, w),), {
        "encoder_hidden_states": d.normal(b, text, dim),
        "encoder_attention_mask": d.mask(_cycle(lengths, b), text),
        "timestep": d.full(b, 700.0),
        "return_dict": False,
        "attention_kwargs": None,
    }


def lumina2(d: Draw, b: int, *, h: int, w: int, text: int, lengths: Sequence[int], channels: int, dim: int) -> Inputs:
    return (), {
        "hidden_states": d.normal(b, channels, h, w),
        "timestep": d.full(b, 0.3),
        "encoder_hidden_states": d.normal(b, text, dim),
        "encoder_attention_mask": d.mask(_cycle(lengths, b), text, torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def zimage(d: Draw, b: int, *, h: int, w: int, lengths: Sequence[int], channels: int, dim: int) -> Inputs:
    latents = list(d.normal(b, channels, 1, h, w).unbind(0))
    captions = [d.normal(length, dim) for length in _cycle(lengths, b)]
    return (latents, d.full(b, 0.3), captions), {"joint_attention_kwargs": None, "return_dict": False}


def _cycle(lengths: Sequence[int], batch: int) -> list[int]:
    return [lengths[i % len(lengths)] for i in range(batch)]


# ---- the models


def _flux(guided: bool = True) -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=18, num_attention_heads=5,
        joint_attention_dim=28, pooled_projection_dim=22, guidance_embeds=guided, axes_dims_rope=(4, 6, 8),
    )  # fmt: skip


def _flux2() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=20, num_attention_heads=5,
        joint_attention_dim=28, timestep_guidance_channels=32, axes_dims_rope=(4, 6, 6, 4),
    )  # fmt: skip


def _sd3(dual: tuple[int, ...] = (), qk_norm: str | None = None) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=24, in_channels=6, out_channels=6, num_layers=3, attention_head_dim=12, num_attention_heads=5,
        joint_attention_dim=28, caption_projection_dim=60, pooled_projection_dim=22, pos_embed_max_size=15,
        dual_attention_layers=dual, qk_norm=qk_norm,
    )  # fmt: skip


def _pixart(micro: bool = False) -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=5, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=60, sample_size=20, caption_channels=28, use_additional_conditions=micro,
    )  # fmt: skip


def _hunyuandit() -> nn.Module:
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=5, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=20, hidden_size=80,
        num_layers=6, cross_attention_dim=28, cross_attention_dim_t5=24, pooled_projection_dim=22, text_len=11,
        text_len_t5=13,
    )  # fmt: skip


def _cogvideox(**config: Any) -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=5, attention_head_dim=16, in_channels=6, out_channels=6, time_embed_dim=22, num_layers=3,
        text_embed_dim=28, sample_width=14, sample_height=10, sample_frames=17, max_text_seq_length=13, **config,
    )  # fmt: skip


def _latte() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=5, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=60, attention_bias=True, sample_size=16, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=28, video_length=5,
    )  # fmt: skip


def _mochi() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=5, attention_head_dim=16, num_layers=3, pooled_projection_dim=44, in_channels=6,
        out_channels=6, text_embed_dim=32, time_embed_dim=22, max_sequence_length=13,
    )  # fmt: skip


def _dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=5, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=3, sample_size=14,
        num_embeds_ada_norm=1000,
    )  # fmt: skip


def _wan(channels: int = 6, **config: Any) -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=5, attention_head_dim=14, in_channels=channels, out_channels=6, text_dim=28, freq_dim=22,
        ffn_dim=94, num_layers=3, rope_max_seq_len=33, **config,
    )  # fmt: skip


def _qwenimage() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=24, out_channels=6, num_layers=3, attention_head_dim=18, num_attention_heads=5,
        joint_attention_dim=28, axes_dims_rope=(4, 6, 8),
    )  # fmt: skip


def _sana(**config: Any) -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=6, out_channels=6, num_attention_heads=5, attention_head_dim=12, num_layers=3,
        num_cross_attention_heads=3, cross_attention_head_dim=20, cross_attention_dim=60, caption_channels=28,
        sample_size=9, **config,
    )  # fmt: skip


def _lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=22, in_channels=6, hidden_size=120, num_layers=3, num_refiner_layers=2, num_attention_heads=15,
        num_kv_heads=5, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(40, 24, 24), cap_feat_dim=28,
    )  # fmt: skip


def _zimage() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=6, dim=80, n_layers=3, n_refiner_layers=2, n_heads=5, n_kv_heads=5, cap_feat_dim=28,
        axes_dims=[4, 4, 8], axes_lens=[256, 24, 24],
    )  # fmt: skip


_FLUX = partial(flux, h=7, w=11, text=13, channels=12, dim=28, pooled=22)
_SD3 = partial(sd3, h=14, w=22, text=13, channels=6, dim=28, pooled=22)
_PIXART = partial(pixart, h=14, w=22, lengths=(5, 13), text=13, channels=4, dim=28)
_COGVIDEOX = partial(cogvideox, frames=5, h=10, w=14, text=13, channels=6, dim=28)
_WAN = partial(wan, frames=5, h=10, w=14, text=13, channels=6, dim=28)
_QWEN = partial(qwenimage, h=7, w=11, text=13, channels=24, dim=28)
_SANA = partial(sana, h=7, w=11, text=13, lengths=(5, 13), channels=6, dim=28)
_LUMINA2 = partial(lumina2, h=14, w=22, text=13, channels=6, dim=28)
_ZIMAGE = partial(zimage, h=14, w=22, channels=6, dim=28)

_CASES = [
    Case("flux", _flux, partial(_FLUX, guided=True), 1),
    Case("flux_unguided", partial(_flux, False), partial(_FLUX, guided=False), 2),
    Case("flux2", _flux2, partial(flux2, h=7, w=11, text=13, channels=12, dim=28), 1),
    Case("sd3", _sd3, _SD3),
    Case("sd3_dual", partial(_sd3, (0, 1), "rms_norm"), _SD3),
    Case("pixart", _pixart, _PIXART),
    Case("pixart_alpha", partial(_pixart, True), partial(_PIXART, micro=True)),
    Case(
        "hunyuandit",
        _hunyuandit,
        partial(
            hunyuandit,
            h=14,
            w=22,
            text=11,
            text_t5=13,
            channels=4,
            dim=28,
            dim_t5=24,
            head_dim=16,
            lengths=(5, 11),
            lengths_t5=(7, 13),
        ),  # fmt: skip
        idle=(("style", "an index into a table of one row"),),
    ),
    Case("cogvideox", _cogvideox, _COGVIDEOX),
    Case(
        "cogvideox_learned",
        partial(_cogvideox, use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True),
        partial(_COGVIDEOX, head_dim=16),
    ),
    Case(
        "cogvideox_rotary", partial(_cogvideox, use_rotary_positional_embeddings=True), partial(_COGVIDEOX, head_dim=16)
    ),
    Case(
        "cogvideox_1_5",
        partial(_cogvideox, use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False, ofs_embed_dim=22),
        partial(_COGVIDEOX, frames=6, head_dim=16, patch_t=2, sliced=True, ofs=True),
    ),
    Case("latte", _latte, partial(latte, frames=5, h=14, w=22, text=13, channels=4, dim=28)),
    Case("mochi", _mochi, partial(mochi, frames=5, h=10, w=14, text=13, lengths=(7, 13), channels=6, dim=32)),
    Case("dit", _dit, partial(dit, size=14, channels=4, classes=1000)),
    Case("wan_t2v", _wan, _WAN, 1),
    Case(
        "wan_i2v",
        partial(_wan, 10, image_dim=26, added_kv_proj_dim=70),
        partial(_WAN, channels=10, text=512, image=9, image_dim=26),
        1,
    ),
    Case("qwenimage", _qwenimage, _QWEN, 1),
    Case("qwenimage_masked", _qwenimage, partial(_QWEN, lengths=(7, 13)), 2),
    Case("sana", _sana, _SANA),
    Case("lumina2", _lumina2, partial(_LUMINA2, lengths=(9,)), 1),
    Case("lumina2_ragged", _lumina2, partial(_LUMINA2, lengths=(5, 13)), 2),
    Case("zimage", _zimage, partial(_ZIMAGE, lengths=(13, 19))),
    Case("zimage_ragged", _zimage, partial(_ZIMAGE, lengths=(13, 37))),
]

MODELS: dict[str, Case] = {case.name: case for case in _CASES}
