"""Whole pipelines that are called with a prompt: their own tokenizers and text encoders, tiny."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from commands import TINY_PIPELINE
from conformance import texts
from conformance.case import Case
from conformance.parts import IMAGE, drawn, euler, flow, kl, like
from zoo.more import MORE
from zoo.transformers import Draw


def _sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, dtype=torch.float32)


def _sd15() -> Any:
    return like("sd15", diffusers.StableDiffusionPipeline, text_encoder=texts.clip_text(),
                tokenizer=texts.clip_tokenizer())  # fmt: skip


def _sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=24, layers_per_block=1, block_out_channels=(20, 40), norm_num_groups=5,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), cross_attention_dim=28 + 24, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=22 + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=kl(4), text_encoder=texts.clip_text(28), text_encoder_2=texts.clip_text(24, projected=True),
        tokenizer=texts.clip_tokenizer(), tokenizer_2=texts.clip_tokenizer(), unet=drawn(unet), scheduler=euler(),
        add_watermarker=False,
    )  # fmt: skip


def _pixart() -> Any:
    return like("pixart", diffusers.PixArtSigmaPipeline, text_encoder=texts.t5(28), tokenizer=texts.t5_tokenizer())


def _flux() -> Any:
    return like(
        "flux", diffusers.FluxPipeline, text_encoder=texts.clip_text(22), tokenizer=texts.clip_tokenizer(),
        text_encoder_2=texts.t5(28), tokenizer_2=texts.t5_tokenizer(),
    )  # fmt: skip


def _auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        text_encoder=texts.t5(28), tokenizer=texts.t5_tokenizer(), vae=kl(6), transformer=MORE["auraflow"].build(),
        scheduler=flow(),
    )  # fmt: skip


def _prompted(d: Draw, request: int) -> dict[str, Any]:
    return {"prompt": texts.PROMPTS[request], **IMAGE[request]}


def _short(d: Draw, request: int) -> dict[str, Any]:
    return {**_prompted(d, request), "max_sequence_length": (16, 12)[request]}


def _tiny(d: Draw, request: int) -> dict[str, Any]:
    return {"prompt": texts.PROMPTS[request], "max_sequence_length": 32, "height": (96, 64)[request], "width": 96}


def _pixart_arguments(d: Draw, request: int) -> dict[str, Any]:
    return {**_short(d, request), "use_resolution_binning": False, "clean_caption": False}


PROMPTED: list[Case] = [
    Case("sd3_prompted", _sd3, _tiny),
    Case("sd15_prompted", _sd15, _prompted),
    Case("sdxl_prompted", _sdxl, _prompted),
    Case("pixart_prompted", _pixart, _pixart_arguments),
    Case("flux_prompted", _flux, _short),
    Case("auraflow_prompted", _auraflow, _short),
]
