"""Further text-to-image transformers."""

from __future__ import annotations

from typing import Any

import diffusers
from conformance.case import Case, repeated
from conformance.parts import V, by_size, drawn, flow, kl, none, prompts
from torch import nn
from zoo.more import MORE
from zoo.pipelines import PIPELINES
from zoo.transformers import MODELS, Draw

TEXT = none("text_encoder", "tokenizer")


def _auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        **TEXT, vae=kl(6), transformer=MORE["auraflow"].build(), scheduler=flow(shift=1.73)
    )


def _cogview3() -> Any:
    return diffusers.CogView3PlusPipeline(
        **TEXT, vae=kl(6), transformer=MORE["cogview3plus"].build(),
        scheduler=diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing"),
    )  # fmt: skip


def _cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        **TEXT, vae=kl(6), transformer=MORE["cogview4"].build(), scheduler=flow(use_dynamic_shifting=True)
    )


def _lumina() -> Any:
    return diffusers.LuminaPipeline(**TEXT, vae=kl(6), transformer=MORE["lumina"].build(), scheduler=flow())


def _lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        **TEXT, vae=kl(6, shift_factor=0.1), transformer=MODELS["lumina2"].build(), scheduler=flow(shift=6.0)
    )


def _chroma() -> Any:
    return diffusers.ChromaPipeline(
        **TEXT, vae=kl(3, shift_factor=0.1), transformer=MORE["chroma"].build(), scheduler=flow()
    )


def _hidream() -> Any:
    encoders = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")]
    pipe = diffusers.HiDreamImagePipeline(
        **none(*encoders), vae=kl(6, shift_factor=0.1), transformer=MORE["hidream"].build(), scheduler=flow(shift=3.0)
    )
    pipe.default_sample_size = 16  # pictures are scaled to this area
    return pipe


def _hidream_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for sign in ("", "negative_"):
        given[f"{sign}prompt_embeds_t5"] = d.normal(1, 13, 28)
        given[f"{sign}prompt_embeds_llama3"] = d.normal(2, 1, 11, 26)
        given[f"{sign}pooled_prompt_embeds"] = d.normal(1, 22)
    return given


def _bria() -> Any:
    return diffusers.BriaPipeline(
        **TEXT, vae=kl(3, shift_factor=0.1), transformer=MORE["bria"].build(),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(prediction_type=V),
    )  # fmt: skip


def _zimage() -> Any:
    return diffusers.ZImagePipeline(
        **TEXT, vae=kl(6, shift_factor=0.1), transformer=MODELS["zimage"].build(), scheduler=flow(shift=3.0)
    )


def _zimage_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {"prompt_embeds": [d.normal(13, 28)], "negative_prompt_embeds": [d.normal(9, 28)]}


def _ernie_vae() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    config = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "latent_channels": 3, **blocks}
    return drawn(diffusers.AutoencoderKLFlux2(**config))


def _flux2() -> Any:
    return diffusers.Flux2Pipeline(
        **TEXT, vae=_ernie_vae(), transformer=MODELS["flux2"].build(), scheduler=flow(use_dynamic_shifting=True)
    )


def _ernie() -> Any:
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=80, num_attention_heads=5, num_layers=3, ffn_hidden_size=94, in_channels=12, out_channels=12,
        text_in_dim=28, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    return diffusers.ErnieImagePipeline(**TEXT, vae=_ernie_vae(), transformer=drawn(model), scheduler=flow(shift=3.0))


def _ernie_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {"prompt_embeds": [d.normal(13, 28)], "negative_prompt_embeds": [d.normal(9, 28)]}


def _prx() -> Any:
    return diffusers.PRXPipeline(
        **TEXT, vae=kl(6, shift_factor=0.1), transformer=MORE["prx"].build(), scheduler=flow(shift=3.0)
    )


def _ovis() -> Any:
    return diffusers.OvisImagePipeline(
        **TEXT, vae=kl(3, shift_factor=0.1), transformer=MORE["ovis"].build(), scheduler=flow(use_dynamic_shifting=True)
    )


def _pixart_alpha() -> Any:
    return diffusers.PixArtAlphaPipeline(
        **TEXT, vae=kl(4), transformer=MODELS["pixart"].build(),
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type=V),
    )  # fmt: skip


def _pixart_alpha_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    more = {"negative_prompt": None, "use_resolution_binning": False, "clean_caption": False}
    return {**prompts(d, lengths=(9, 13)), **more}


def _krea2() -> Any:
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=3, num_res_blocks=1, latents_mean=[0.1] * 3, latents_std=[0.9] * 3
    )
    return diffusers.Krea2Pipeline(
        **TEXT, vae=drawn(vae), transformer=MORE["krea2"].build(),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def _krea2_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for sign, length in (("", 9), ("negative_", 13)):
        given[f"{sign}prompt_embeds"] = d.normal(1, 13, 3, 30)
        given[f"{sign}prompt_embeds_mask"] = d.mask([length], 13).bool()
    return given


def _sana_sprint() -> Any:
    transformer = drawn(
        diffusers.SanaTransformer2DModel(
            in_channels=6, out_channels=6, num_attention_heads=5, attention_head_dim=12, num_layers=3,
            num_cross_attention_heads=3, cross_attention_head_dim=20, cross_attention_dim=60, caption_channels=28,
            sample_size=9, guidance_embeds=True, qk_norm="rms_norm_across_heads",
        )
    )  # fmt: skip
    return diffusers.SanaSprintPipeline(
        **TEXT, vae=PIPELINES["sana"].build().vae, transformer=transformer, scheduler=diffusers.SCMScheduler()
    )


def _sana_sprint_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, lengths=(9, 13), negative=False), "use_resolution_binning": False}


def _prx_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_masked(d, size), "negative_prompt": None, "use_resolution_binning": False}


def _chroma_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {name: value.float() for name, value in _masked(d, size).items()}


def _masked(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return prompts(d, lengths=(9, 13))


def _plain(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return prompts(d)


_DC = ({"height": 224, "width": 352}, {"height": 160, "width": 288})

TRANSFORMERS: list[Case] = [
    Case("auraflow", _auraflow, by_size(_masked)),
    Case("cogview3", _cogview3, by_size(_plain), pair=repeated),
    Case("cogview4", _cogview4, by_size(_plain)),
    Case("lumina", _lumina, by_size(lambda d, s: {**_masked(d, s), "clean_caption": False}), pair=repeated),
    Case("lumina2", _lumina2, by_size(_masked), pair=repeated),
    Case("chroma", _chroma, by_size(_chroma_arguments), pair=repeated),
    Case("hidream", _hidream, by_size(_hidream_arguments)),
    Case("bria", _bria, by_size(_plain), pair=repeated),
    Case("zimage", _zimage, by_size(_zimage_arguments)),
    Case("flux2", _flux2, by_size(lambda d, s: prompts(d, negative=False))),
    Case("prx", _prx, by_size(_prx_arguments), pair=repeated),
    Case("ernie", _ernie, by_size(_ernie_arguments)),
    Case("krea2", _krea2, by_size(_krea2_arguments)),
    Case("ovis", _ovis, by_size(lambda d, s: {**_plain(d, s), "negative_prompt": None})),
    Case("pixart_alpha", _pixart_alpha, by_size(_pixart_alpha_arguments)),
    Case("sana_sprint", _sana_sprint, by_size(_sana_sprint_arguments, _DC)),
]
