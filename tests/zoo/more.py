"""Further diffusers denoisers, tiny, with the inputs their pipelines pass: text to image, control nets, the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import nn
from zoo import transformers as zoo
from zoo.call import DIM, HEADS, LATENT, PACKED, POOLED, PROMPT, SIZES, TEXT, case, fixed, mask, normal, step, time
from zoo.recent import RECENT
from zoo.transformers import Case, Draw, Inputs
from zoo.unets import UNETS
from zoo.video import VIDEOS

# ---- text to image


def _auraflow() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=22, in_channels=6, num_mmdit_layers=2, num_single_dit_layers=3, attention_head_dim=12,
        num_attention_heads=HEADS, joint_attention_dim=DIM, caption_projection_dim=60, out_channels=6,
        pos_embed_max_size=225,
    )  # fmt: skip


def _cogview(name: str, **config: Any) -> nn.Module:
    return getattr(diffusers, name)(
        in_channels=6, out_channels=6, num_layers=3, attention_head_dim=16, num_attention_heads=HEADS,
        text_embed_dim=DIM, time_embed_dim=24, condition_dim=8, pos_embed_max_size=15, sample_size=22, **config,
    )  # fmt: skip


def _chroma() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=18, num_attention_heads=HEADS,
        joint_attention_dim=DIM, axes_dims_rope=(4, 6, 8), approximator_num_channels=16, approximator_hidden_dim=30,
        approximator_layers=2,
    )  # fmt: skip


def _bria(**config: Any) -> nn.Module:
    return diffusers.BriaTransformer2DModel(
        in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=18, num_attention_heads=HEADS,
        joint_attention_dim=DIM, axes_dims_rope=[4, 6, 8], **config,
    )  # fmt: skip


def _bria_fibo() -> nn.Module:
    return diffusers.BriaFiboTransformer2DModel(
        in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=18, num_attention_heads=HEADS,
        joint_attention_dim=DIM, axes_dims_rope=[4, 6, 8], text_encoder_dim=26,
    )  # fmt: skip


def _lumina() -> nn.Module:
    return diffusers.LuminaNextDiT2DModel(
        sample_size=22, in_channels=6, hidden_size=80, num_layers=3, num_attention_heads=10, num_kv_heads=5,
        multiple_of=2, cross_attention_dim=DIM,
    )  # fmt: skip


def _longcat() -> nn.Module:
    return diffusers.LongCatImageTransformer2DModel(
        in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=18, num_attention_heads=HEADS,
        joint_attention_dim=DIM, pooled_projection_dim=POOLED, axes_dims_rope=[4, 6, 8],
    )  # fmt: skip


def _ovis() -> nn.Module:
    return diffusers.OvisImageTransformer2DModel(
        in_channels=12, out_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=18,
        num_attention_heads=HEADS, joint_attention_dim=DIM, axes_dims_rope=(4, 6, 8),
    )  # fmt: skip


def _prx() -> nn.Module:
    return diffusers.PRXTransformer2DModel(
        in_channels=6, context_in_dim=DIM, hidden_size=80, num_heads=HEADS, depth=3, axes_dim=[8, 8],
    )  # fmt: skip


def _hidream() -> nn.Module:
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=6, out_channels=6, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=HEADS, caption_channels=[DIM, 26], text_emb_dim=POOLED, num_routed_experts=3,
        num_activated_experts=2, axes_dims_rope=(4, 6, 6), max_resolution=(14, 22), llama_layers=[0, 1, 1, 0],
        force_inference_output=True,
    )  # fmt: skip


def _prior() -> nn.Module:
    return diffusers.PriorTransformer(
        num_attention_heads=HEADS, attention_head_dim=12, num_layers=3, embedding_dim=DIM, num_embeddings=TEXT,
    )  # fmt: skip


IMAGES = [
    case("auraflow", _auraflow, hidden_states=LATENT, encoder_hidden_states=PROMPT, timestep=time(0.7)),
    case(
        "cogview3plus", partial(_cogview, "CogView3PlusTransformer2DModel"),
        hidden_states=LATENT, encoder_hidden_states=PROMPT, timestep=step(), **SIZES,
    ),
    case(
        "cogview4", partial(_cogview, "CogView4Transformer2DModel", rope_axes_dim=(22, 22)), 1,
        hidden_states=LATENT, encoder_hidden_states=PROMPT, timestep=step(), attention_kwargs=None, **SIZES,
    ),
    case(
        "chroma", _chroma, 1, joint_attention_kwargs=None,
        attention_mask=mask(9 + 77, total=TEXT + 77, dtype=torch.float32), **PACKED,
    ),
    case("bria", _bria, attention_kwargs=None, **PACKED),
    case(
        "bria_fibo", _bria_fibo, joint_attention_kwargs={},
        text_encoder_layers=lambda d, b: [d.normal(b, TEXT, 26) for _ in range(5)], **PACKED,
    ),
    case(
        "lumina", _lumina, hidden_states=LATENT, timestep=time(0.3), encoder_hidden_states=PROMPT,
        encoder_mask=mask(7, 13), image_rotary_emb=fixed(lambda: get_2d_rotary_pos_embed_lumina(8, 384, 384)),
        cross_attention_kwargs={"base_sequence_length": 77},
    ),
    case("longcat", _longcat, guidance=None, **PACKED),
    case("ovis", _ovis, **PACKED),
    case(
        "prx", _prx, hidden_states=LATENT, timestep=time(0.7), encoder_hidden_states=PROMPT,
        attention_mask=mask(7, 13, dtype=torch.bool),
    ),
    case(
        "hidream", _hidream, hidden_states=LATENT, timesteps=step(), encoder_hidden_states_t5=PROMPT,
        encoder_hidden_states_llama3=lambda d, b: d.normal(2, b, 11, 26), pooled_embeds=normal(POOLED),
    ),
    case(
        "prior", _prior, hidden_states=normal(DIM), timestep=step(), proj_embedding=normal(DIM),
        encoder_hidden_states=PROMPT, attention_mask=mask(7, 13, dtype=torch.bool),
    ),
]  # fmt: skip


# ---- control nets of transformers


def _sd3_controlnet() -> nn.Module:
    return diffusers.SD3ControlNetModel(
        sample_size=24, in_channels=6, num_layers=2, attention_head_dim=12, num_attention_heads=HEADS,
        joint_attention_dim=DIM, caption_projection_dim=60, pooled_projection_dim=POOLED, out_channels=6,
        pos_embed_max_size=15,
    )  # fmt: skip


def _flux_controlnet() -> nn.Module:
    return diffusers.FluxControlNetModel(
        in_channels=12, num_layers=2, num_single_layers=2, attention_head_dim=18, num_attention_heads=HEADS,
        joint_attention_dim=DIM, pooled_projection_dim=POOLED, guidance_embeds=True, axes_dims_rope=[4, 6, 8],
    )  # fmt: skip


def _hunyuandit_controlnet() -> nn.Module:
    return diffusers.HunyuanDiT2DControlNetModel(
        num_attention_heads=HEADS, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=20, hidden_size=80,
        transformer_num_layers=6, cross_attention_dim=DIM, cross_attention_dim_t5=24, pooled_projection_dim=POOLED,
        text_len=11, text_len_t5=TEXT,
    )  # fmt: skip


def _qwenimage_controlnet() -> nn.Module:
    return diffusers.QwenImageControlNetModel(
        in_channels=24, out_channels=6, num_layers=2, attention_head_dim=18, num_attention_heads=HEADS,
        joint_attention_dim=DIM, axes_dims_rope=(4, 6, 8),
    )  # fmt: skip


def _sana_controlnet() -> nn.Module:
    return diffusers.SanaControlNetModel(
        in_channels=6, out_channels=6, num_attention_heads=HEADS, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=3, cross_attention_head_dim=20, cross_attention_dim=60, caption_channels=DIM,
        sample_size=9,
    )  # fmt: skip


def controlled(name: str, make: Callable[[], nn.Module], like: str, *drop: str, **extra: Any) -> Case:
    """A control net that takes the inputs of the model it steers, and a condition."""

    def feed(d: Draw, b: int) -> Inputs:
        args, kwargs = zoo.MODELS[like].feed(d, b)
        more = {key: value(d, b) if callable(value) else value for key, value in extra.items()}
        return args, {key: value for key, value in kwargs.items() if key not in drop} | more

    return Case(name, make, feed, zoo.MODELS[like].batch, zoo.MODELS[like].idle)


CONTROLNETS = [
    controlled("sd3_controlnet", _sd3_controlnet, "sd3", controlnet_cond=LATENT, conditioning_scale=0.8),
    controlled("flux_controlnet", _flux_controlnet, "flux", controlnet_cond=normal(77, 12), conditioning_scale=0.8),
    controlled(
        "hunyuandit_controlnet", _hunyuandit_controlnet, "hunyuandit", controlnet_cond=normal(4, 14, 22),
        conditioning_scale=0.8,
    ),
    controlled(
        "qwenimage_controlnet", _qwenimage_controlnet, "qwenimage", "guidance", "attention_kwargs",
        controlnet_cond=normal(77, 24), conditioning_scale=0.8,
    ),
    controlled("sana_controlnet", _sana_controlnet, "sana", controlnet_cond=normal(6, 7, 11), conditioning_scale=0.8),
]  # fmt: skip

MORE: dict[str, Case] = {case.name: case for case in [*IMAGES, *RECENT, *CONTROLNETS, *VIDEOS]} | UNETS
