"""Further pipelines of transformers: pictures and videos, from others or under their control."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from conformance import pictures, texts, videos
from conformance.case import Case, repeated
from conformance.parts import MORE_STEPS, by_size, drawn, flow, kl, like, lower_right, none, photo, picture, prompts
from torch import nn
from zoo.more import MORE
from zoo.pipelines import PIPELINES
from zoo.transformers import MODELS, Draw
from zoo.video import WAN

SMALL = ({"height": 64, "width": 96}, {"height": 64, "width": 64})
CLIPS = ({"height": 64, "width": 96}, {"height": 64, "width": 64})
DEEP = ({"height": 128, "width": 192}, {"height": 128, "width": 128})
TEXT = none("text_encoder", "tokenizer")
TEXTS = none("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def _pooled(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return prompts(d, pooled=22, negative=False)


def _adding(make: Any, *names: str) -> Any:
    """Arguments and pictures of these names; one that speaks of a mask is a mask."""

    def arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
        more = {name: lower_right(size) if "mask" in name else picture(d, size) for name in names}
        return {**make(d, size), **more}

    return arguments


# ---- pictures


def _of_flux(cls: Any, channels: int = 16, **more: Any) -> Any:
    return pictures.of_flux(cls, channels, **more)


def _flux_control() -> nn.Module:
    return drawn(
        diffusers.FluxControlNetModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=18, num_attention_heads=5,
            joint_attention_dim=28, pooled_projection_dim=22, guidance_embeds=True, axes_dims_rope=[4, 6, 8],
        )
    )  # fmt: skip


def _kontext(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_pooled(d, size), "_auto_resize": False, "max_area": size["height"] * size["width"]}


def _flux2(cls: Any) -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    config = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "latent_channels": 3, **blocks}
    vae = drawn(diffusers.AutoencoderKLFlux2(**config))
    model = MODELS["flux2"].build()
    return cls(**TEXT, vae=vae, transformer=model, scheduler=flow(use_dynamic_shifting=True))


def _qwen(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    masks = {f"{sign}prompt_embeds_mask": d.mask([13], 13) for sign in ("", "negative_")}
    return {**prompts(d), **masks}


def _qwen_control_inpaint() -> Any:
    control = diffusers.QwenImageControlNetModel(
        in_channels=24, out_channels=6, num_layers=2, attention_head_dim=18, num_attention_heads=5,
        joint_attention_dim=28, axes_dims_rope=(4, 6, 8), extra_condition_channels=4,
    )  # fmt: skip
    return like("qwenimage", diffusers.QwenImageControlNetInpaintPipeline, controlnet=drawn(control))


def _chroma(cls: Any) -> Any:
    model = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=18, num_attention_heads=5,
        joint_attention_dim=28, axes_dims_rope=(4, 6, 8), approximator_num_channels=16, approximator_hidden_dim=30,
        approximator_layers=2,
    )  # fmt: skip
    return cls(**TEXT, vae=kl(4, shift_factor=0.1), transformer=drawn(model), scheduler=flow())


def _masked(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {name: value.float() for name, value in prompts(d, lengths=(9, 13)).items()}


def _zimage(cls: Any, **more: Any) -> Any:
    model = MODELS["zimage"].build()
    return cls(**TEXT, vae=kl(6, shift_factor=0.1), transformer=model, scheduler=flow(shift=3.0), **more)


def _zimage_control() -> Any:
    control = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 2], control_refiner_layers_places=[0], control_in_dim=6, dim=80, n_refiner_layers=2,
        n_heads=5, n_kv_heads=5, add_control_noise_refiner="control_noise_refiner",
    )  # fmt: skip
    return _zimage(diffusers.ZImageControlNetPipeline, controlnet=drawn(control))


def _lists(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {"prompt_embeds": [d.normal(13, 28)], "negative_prompt_embeds": [d.normal(9, 28)]}


def _sd3_control() -> nn.Module:
    return drawn(
        diffusers.SD3ControlNetModel(
            sample_size=24, in_channels=6, num_layers=2, attention_head_dim=12, num_attention_heads=5,
            joint_attention_dim=28, caption_projection_dim=60, pooled_projection_dim=22, out_channels=6,
            pos_embed_max_size=15, extra_conditioning_channels=1,
        )
    )  # fmt: skip


def _hunyuandit(d: Draw, request: int) -> dict[str, Any]:
    return {**PIPELINES["hunyuandit"].arguments(d), **SMALL[request]}


def _unbinned(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given = {**prompts(d, lengths=(9, 13)), "negative_prompt": None, "use_resolution_binning": False}
    return {**given, "clean_caption": False}


def _sprint() -> Any:
    model = diffusers.SanaTransformer2DModel(
        in_channels=6, out_channels=6, num_attention_heads=5, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=3, cross_attention_head_dim=20, cross_attention_dim=60, caption_channels=28,
        sample_size=9, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    return like("sana", diffusers.SanaSprintImg2ImgPipeline, transformer=drawn(model),
                scheduler=diffusers.SCMScheduler())  # fmt: skip


def _sprint_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given = {**prompts(d, lengths=(9, 13), negative=False), "use_resolution_binning": False}
    return {**given, "image": picture(d, size)}


def _cogview4_control() -> Any:
    model = diffusers.CogView4Transformer2DModel(
        in_channels=12, out_channels=6, num_layers=2, attention_head_dim=16, num_attention_heads=5, text_embed_dim=28,
        time_embed_dim=24, condition_dim=8, pos_embed_max_size=15, sample_size=22, rope_axes_dim=(22, 22),
    )  # fmt: skip
    return diffusers.CogView4ControlPipeline(
        **TEXT, vae=kl(6), transformer=drawn(model), scheduler=flow(use_dynamic_shifting=True)
    )


def _hunyuan_image() -> Any:
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(32, 64), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=32, scaling_factor=0.5,
    )  # fmt: skip
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=5, attention_head_dim=16, num_layers=1,
        num_single_layers=2, text_embed_dim=28, text_embed_2_dim=26, rope_axes_dim=(8, 8),
    )  # fmt: skip
    guider = diffusers.guiders.AdaptiveProjectedMixGuidance
    return diffusers.HunyuanImagePipeline(
        **TEXTS, scheduler=flow(shift=3.0), vae=drawn(vae), transformer=drawn(model), guider=guider(),
        ocr_guider=guider(),
    )  # fmt: skip


def _two_texts(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for sign in ("", "negative_"):
        given[f"{sign}prompt_embeds"], given[f"{sign}prompt_embeds_2"] = d.normal(1, 13, 28), d.normal(1, 11, 26)
        given[f"{sign}prompt_embeds_mask"], given[f"{sign}prompt_embeds_mask_2"] = d.mask([9], 13), d.mask([7], 11)
    return given


def _prx_pixel() -> Any:
    model = diffusers.PRXTransformer2DModel(
        in_channels=3, context_in_dim=28, hidden_size=80, num_heads=5, depth=2, axes_dim=[8, 8], patch_size=8,
    )  # fmt: skip
    return diffusers.PRXPixelPipeline(**TEXT, transformer=drawn(model), scheduler=flow(shift=3.0))


def _glm() -> Any:
    return diffusers.GlmImagePipeline(
        **TEXT, processor=None, vision_language_encoder=None, vae=kl(6, latents_mean=[0.1] * 6, latents_std=[0.9] * 6),
        transformer=MORE["glm_image"].build(),
        scheduler=flow(use_dynamic_shifting=True),
    )  # fmt: skip


def _glm_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    tokens = size["height"] * size["width"] // 16**2
    return {**prompts(d), "prior_token_ids": torch.randint(50, (1, tokens), generator=d.generator)}


def _kandinsky5_t2i() -> Any:
    pipe = diffusers.Kandinsky5T2IPipeline(
        **TEXTS, transformer=MORE["kandinsky5"].build(), vae=kl(6), scheduler=flow(shift=5.0)
    )
    pipe.resolutions = [(size["width"], size["height"]) for size in SMALL]
    return pipe


def _kandinsky5_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for sign in ("", "negative_"):
        given[f"{sign}prompt_embeds_qwen"], given[f"{sign}prompt_embeds_clip"] = d.normal(1, 13, 28), d.normal(1, 22)
        given[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, 13], dtype=torch.int32)
    return given


def _nucleus() -> Any:
    return like("qwenimage", diffusers.NucleusMoEImagePipeline, transformer=MORE["nucleus_moe"].build(), processor=None)


# ---- videos


def _clip(d: Draw, size: dict[str, int], frames: int = 5) -> list[Any]:
    return [photo(d, size) for _ in range(frames)]


def _framed(make: Any, frames: int = 5, **more: Any) -> Any:
    return lambda d, size: {**make(d, size), "num_frames": frames, **more}


def _plain(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return prompts(d)


def _cogvideox_control() -> Any:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=5, attention_head_dim=16, in_channels=12, out_channels=6, time_embed_dim=22, num_layers=2,
        text_embed_dim=28, sample_width=14, sample_height=10, sample_frames=17, max_text_seq_length=13,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return like("cogvideox", diffusers.CogVideoXFunControlPipeline, transformer=drawn(model))


def _hunyuan15() -> Any:
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=6, block_out_channels=(12, 12, 24, 24, 24), layers_per_block=1
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        **TEXTS, vae=drawn(vae), transformer=MORE["hunyuan_video15"].build(), scheduler=flow(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 9
    return pipe


def _kandinsky5() -> Any:
    return diffusers.Kandinsky5T2VPipeline(
        **TEXTS, transformer=MORE["kandinsky5"].build(), vae=videos.hunyuan_vae(), scheduler=flow(shift=5.0)
    )


def _motif() -> Any:
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=13, out_channels=6, num_attention_heads=5, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_decoder_layers=1, text_embed_dim=28, enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    return diffusers.MotifVideoPipeline(
        **TEXT, vae=PIPELINES["wan"].build().vae, transformer=drawn(model), scheduler=flow(shift=5.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )  # fmt: skip


def _masked_video(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, lengths=(9, 13)), "num_frames": 5}


def _wan_like(cls: Any, channels: int = 6, **more: Any) -> Any:
    model = diffusers.WanTransformer3DModel(**{**WAN, "in_channels": channels, "num_layers": 2})
    return like("wan", cls, transformer=drawn(model), **more)


def _skyreels(cls: Any, config: dict[str, Any] | None = None, **more: Any) -> Any:
    model = diffusers.SkyReelsV2Transformer3DModel(**{**WAN, "num_layers": 2, **(config or {})})
    return like("wan", cls, transformer=drawn(model), **more)


_SEEING = {"in_channels": 6 + 4 + 6, "image_dim": 24, "added_kv_proj_dim": 70}


def _seen(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, text=512), "num_frames": 5, "image": photo(d, size)}


def _forced(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {"prompt": None, **prompts(d), "num_frames": 5, "base_num_frames": 5}


def _anyflow() -> Any:
    return diffusers.AnyFlowPipeline(
        **TEXT, vae=PIPELINES["wan"].build().vae, transformer=MORE["anyflow"].build(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(),
    )  # fmt: skip


def _sana_video() -> Any:
    return diffusers.SanaImageToVideoPipeline(
        **TEXT, vae=PIPELINES["wan"].build().vae, transformer=MORE["sana_video"].build(), scheduler=flow()
    )


def _sana_video_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given = {**prompts(d, lengths=(9, 13)), "negative_prompt": None, "frames": 5, "image": photo(d, size)}
    return {**given, "use_resolution_binning": False}


def _easyanimate(cls: Any, channels: int) -> Any:
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=6, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
    )  # fmt: skip
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=5, attention_head_dim=16, in_channels=channels, out_channels=6, patch_size=2, num_layers=2,
        mmdit_layers=1, sample_width=14, sample_height=10, time_embed_dim=22, text_embed_dim=28,
    )  # fmt: skip
    return cls(**TEXT, vae=drawn(vae), transformer=drawn(model), scheduler=flow())


def _animated(name: str, **more: Any) -> Any:
    def arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
        video = d.normal(1, 3, 5, size["height"], size["width"]).sigmoid()
        return {**prompts(d, lengths=(9, 13)), "num_frames": 5, name: video, **more}

    return arguments


def _hunyuan_skyreels() -> Any:
    model = videos.hunyuan_denoiser(12, 1, 2)
    return diffusers.HunyuanSkyreelsImageToVideoPipeline(
        **TEXTS, vae=videos.hunyuan_vae(), transformer=model, scheduler=flow(shift=7.0)
    )


def _hunyuan_image_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, pooled=22, lengths=(9, 13)), "num_frames": 5, "image": photo(d, size)}


def _cosmos_world() -> Any:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=6, encoder_block_out_channels=(8, 8, 16, 16), decode_block_out_channels=(8, 16, 16, 16),
        attention_resolutions=(8,), resolution=64, num_layers=1, latents_mean=[0.1] * 12, latents_std=[0.9] * 12,
    )  # fmt: skip
    return diffusers.CosmosTextToWorldPipeline(
        **TEXT, transformer=videos.cosmos_denoiser(2), vae=drawn(vae), safety_checker=videos.Passing(),
        scheduler=diffusers.EDMEulerScheduler(sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"),
    )  # fmt: skip


def _chronoedit() -> Any:
    model = diffusers.ChronoEditTransformer3DModel(**{**WAN, "num_layers": 2, **_SEEING})
    return like(
        "wan", diffusers.ChronoEditPipeline, transformer=drawn(model), image_encoder=texts.clip_vision(),
        image_processor=texts.clip_pictures(),
    )  # fmt: skip


FURTHER: list[Case] = [
    Case("flux_control_img2img", partial(_of_flux, diffusers.FluxControlImg2ImgPipeline, 32),
         by_size(_adding(_pooled, "image", "control_image"), SMALL), MORE_STEPS),
    Case("flux_control_inpaint", partial(_of_flux, diffusers.FluxControlInpaintPipeline, 32),
         by_size(_adding(_pooled, "image", "control_image", "mask_image"), SMALL), MORE_STEPS),
    Case("flux_controlnet_img2img", lambda: _of_flux(diffusers.FluxControlNetImg2ImgPipeline,
         controlnet=_flux_control()), by_size(_adding(_pooled, "image", "control_image"), SMALL), MORE_STEPS),
    Case("flux_controlnet_inpaint", lambda: _of_flux(diffusers.FluxControlNetInpaintPipeline,
         controlnet=_flux_control()), by_size(_adding(_pooled, "image", "control_image", "mask_image"), SMALL),
         MORE_STEPS),
    Case("flux_kontext_inpaint", partial(_of_flux, diffusers.FluxKontextInpaintPipeline),
         by_size(_adding(_kontext, "image", "mask_image"), SMALL), MORE_STEPS),
    Case("flux2_klein", partial(_flux2, diffusers.Flux2KleinPipeline), by_size(_plain, SMALL)),
    Case("qwenimage_inpaint", partial(like, "qwenimage", diffusers.QwenImageInpaintPipeline),
         by_size(_adding(_qwen, "image", "mask_image"), SMALL), MORE_STEPS),
    Case("qwenimage_controlnet_inpaint", _qwen_control_inpaint,
         by_size(_adding(_qwen, "control_image", "control_mask"), SMALL)),
    Case("chroma_img2img", partial(_chroma, diffusers.ChromaImg2ImgPipeline), by_size(_adding(_masked, "image"), SMALL),
         MORE_STEPS, repeated),
    Case("zimage_controlnet", _zimage_control, by_size(_adding(_lists, "control_image"), SMALL)),
    Case("zimage_img2img", partial(_zimage, diffusers.ZImageImg2ImgPipeline), by_size(_adding(_lists, "image"), SMALL),
         MORE_STEPS),
    Case("zimage_inpaint", partial(_zimage, diffusers.ZImageInpaintPipeline),
         by_size(_adding(_lists, "image", "mask_image"), SMALL), MORE_STEPS),
    Case("sd3_controlnet_inpaint", lambda: like("sd3", diffusers.StableDiffusion3ControlNetInpaintingPipeline,
         controlnet=_sd3_control()), by_size(_adding(lambda d, s: prompts(d, pooled=22), "control_image",
         "control_mask"), SMALL), pair=repeated),
    Case("sd3_pag", partial(like, "sd3", diffusers.StableDiffusion3PAGPipeline),
         by_size(lambda d, s: prompts(d, pooled=22), SMALL), pair=repeated),
    Case("hunyuandit_pag", partial(like, "hunyuandit", diffusers.HunyuanDiTPAGPipeline), _hunyuandit, pair=repeated),
    Case("pixart_pag", partial(like, "pixart", diffusers.PixArtSigmaPAGPipeline), by_size(_unbinned, SMALL)),
    Case("sana_pag", partial(like, "sana", diffusers.SanaPAGPipeline), by_size(_unbinned, DEEP)),
    Case("sana_sprint_img2img", _sprint, by_size(_sprint_arguments, DEEP)),
    Case("cogview4_control", _cogview4_control, by_size(_adding(_plain, "control_image"), SMALL)),
    Case("hunyuan_image", _hunyuan_image, by_size(_two_texts, ({"height": 16, "width": 24},
         {"height": 16, "width": 16}))),
    Case("prx_pixel", _prx_pixel, by_size(lambda d, s: {**prompts(d, lengths=(9, 13)), "negative_prompt": None,
         "use_resolution_binning": False}, SMALL)),
    Case("glm_image", _glm, by_size(_glm_arguments, SMALL)),
    Case("kandinsky5_image", _kandinsky5_t2i, by_size(_kandinsky5_arguments, SMALL)),
    Case("nucleus_moe", _nucleus, by_size(_qwen, SMALL)),
    Case("cogvideox_video_to_video", partial(like, "cogvideox", diffusers.CogVideoXVideoToVideoPipeline),
         by_size(lambda d, s: {**prompts(d), "video": _clip(d, s, 9)}, CLIPS), MORE_STEPS, repeated),
    Case("cogvideox_control", _cogvideox_control, by_size(lambda d, s: {**prompts(d), "control_video": _clip(d, s, 9)},
         CLIPS), pair=repeated),
    Case("hunyuan_video15", _hunyuan15, by_size(_framed(_two_texts), CLIPS)),
    Case("kandinsky5_video", _kandinsky5, by_size(_framed(_kandinsky5_arguments), CLIPS)),
    Case("motif_video", _motif, by_size(_masked_video, CLIPS)),
    Case("ltx_condition", lambda: like("ltx", diffusers.LTXConditionPipeline, scheduler=flow()), by_size(_framed(
         lambda d, s: {**prompts(d, lengths=(9, 13)), "image": photo(d, s)}, 9), DEEP), pair=repeated),
    Case("lucy_edit", partial(_wan_like, diffusers.LucyEditPipeline, 12), by_size(lambda d, s: {**prompts(d),
         "num_frames": 5, "video": _clip(d, s)}, CLIPS)),
    Case("skyreels_image_to_video", lambda: _skyreels(diffusers.SkyReelsV2ImageToVideoPipeline, _SEEING,
         image_encoder=texts.clip_vision(), image_processor=texts.clip_pictures()), by_size(_seen, CLIPS)),
    Case("skyreels_forcing", partial(_skyreels, diffusers.SkyReelsV2DiffusionForcingPipeline), by_size(_forced, CLIPS)),
    Case("anyflow", _anyflow, by_size(_framed(_plain), CLIPS)),
    Case("sana_image_to_video", _sana_video, by_size(_sana_video_arguments, CLIPS)),
    Case("easyanimate_inpaint", partial(_easyanimate, diffusers.EasyAnimateInpaintPipeline, 13),
         by_size(_animated("video"), CLIPS), pair=repeated),
    Case("hunyuan_skyreels", _hunyuan_skyreels, by_size(_hunyuan_image_arguments, CLIPS), pair=repeated),
    Case("cosmos_world", _cosmos_world, by_size(_framed(_plain, 9), CLIPS)),
    Case("chronoedit", _chronoedit, by_size(_seen, CLIPS)),
]  # fmt: skip
