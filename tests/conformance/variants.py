"""Further pipelines of U-Nets: variants of those in `unets` and `pictures`, and diffusers' older ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from conformance import pictures, texts, unets
from conformance.case import Case
from conformance.parts import MORE_STEPS, V, by_size, drawn, euler, kl, like, lower_right, none, photo, picture, prompts
from torch import nn
from zoo.more import MORE
from zoo.transformers import Draw

SMALL = ({"height": 64, "width": 96}, {"height": 64, "width": 64})
FRAMES = 4


def _ddim() -> Any:
    return diffusers.DDIMScheduler(prediction_type=V, clip_sample=False)


def _unsized(make: Any) -> Any:
    """Arguments of a pipeline that takes the sizes of its picture."""
    return lambda d, request: make(d, SMALL[request])


def _drawn(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "image": picture(d, size)}


def _masked(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_drawn(d, size), "mask_image": lower_right(size)}


def _controlled(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_drawn(d, size), "control_image": picture(d, size)}


def _controlled_masked(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_masked(d, size), "control_image": picture(d, size)}


def _pooled(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return prompts(d, pooled=22)


def _pooled_drawn(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_pooled(d, size), "image": picture(d, size)}


def _prompted(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {"prompt": texts.PROMPTS[size["width"] == 64]}


# ---- of SD 1.5


def _with_control(cls: Any, **more: Any) -> Any:
    return like("sd15", cls, controlnet=MORE["unet_controlnet"].build(), **more)


def _with_text(cls: Any, **more: Any) -> Any:
    parts = {"text_encoder": texts.clip_text(), "tokenizer": texts.clip_tokenizer(), **more}
    return like("sd15", cls, image_encoder=None, **parts)


def _depth(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_drawn(d, size), "depth_map": d.normal(1, size["height"], size["width"])}


def _variation() -> Any:
    return like(
        "sd15", diffusers.StableDiffusionImageVariationPipeline, image_encoder=texts.clip_vision(),
        feature_extractor=texts.clip_pictures(),
    )  # fmt: skip


def _lcm() -> Any:
    unet, scheduler = pictures.sd_unet(time_cond_proj_dim=24), diffusers.LCMScheduler(prediction_type=V)
    return like("sd15", diffusers.LatentConsistencyModelImg2ImgPipeline, unet=unet, scheduler=scheduler)


def _ldm3d() -> Any:
    vae = kl(4, in_channels=6, out_channels=6)
    return like("sd15", diffusers.StableDiffusionLDM3DPipeline, vae=vae, image_encoder=None)


def _gligen() -> Any:
    unet = pictures.sd_unet(attention_type="gated")
    return _with_text(diffusers.StableDiffusionGLIGENPipeline, unet=unet)


def _gligen_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_prompted(d, size), "gligen_phrases": ["a red fox"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]}


def _paradigms() -> Any:
    scheduler = diffusers.DDIMParallelScheduler(prediction_type=V, clip_sample=False)
    return like("sd15", diffusers.StableDiffusionParadigmsPipeline, scheduler=scheduler)


def _zero(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_prompted(d, size), "video_length": 2, "t0": 1, "t1": 2}


# ---- of SDXL


def _xl_unet(**config: Any) -> nn.Module:
    return drawn(
        diffusers.UNet2DConditionModel(
            sample_size=12, layers_per_block=1, block_out_channels=(20, 40), norm_num_groups=5, cross_attention_dim=28,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=22 + 6 * 8, **config,
        )
    )  # fmt: skip


def _of_xl(cls: Any, **more: Any) -> Any:
    return like("sdxl", cls, **{"unet": _xl_unet(), **more})


def _xl_small_control(cls: type = diffusers.ControlNetModel, **config: Any) -> nn.Module:
    return drawn(
        cls(
            block_out_channels=(20, 40), layers_per_block=1, attention_head_dim=(2, 4), norm_num_groups=5,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=28,
            use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=22 + 6 * 8,
            conditioning_embedding_out_channels=(6, 8, 10, 12), **config,
        )
    )  # fmt: skip


def _xl_union() -> nn.Module:
    return _xl_small_control(
        diffusers.ControlNetUnionModel, num_trans_channel=20, num_trans_head=2, num_proj_channel=20, num_control_type=3
    )


def _xl_adapter() -> Any:
    adapter = diffusers.T2IAdapter(
        channels=[20, 40], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
    )
    return _of_xl(diffusers.StableDiffusionXLAdapterPipeline, adapter=drawn(adapter))


def _union_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_pooled(d, size), "control_image": [picture(d, size)], "control_mode": [1]}


# ---- videos


def _motion_adapter(**config: Any) -> nn.Module:
    return drawn(
        diffusers.MotionAdapter(
            block_out_channels=(20, 40), motion_layers_per_block=1, motion_norm_num_groups=5,
            motion_num_attention_heads=5, motion_mid_block_layers_per_block=1, **config,
        )
    )  # fmt: skip


def _moving(cls: Any, **more: Any) -> Any:
    return like("sd15", cls, motion_adapter=_motion_adapter(), scheduler=_ddim(), **more)


def _moving_xl() -> Any:
    adapter = _motion_adapter(use_motion_mid_block=False)
    return _of_xl(diffusers.AnimateDiffSDXLPipeline, motion_adapter=adapter, scheduler=_ddim())


def _frames(d: Draw, size: dict[str, int]) -> list[Any]:
    return [photo(d, size) for _ in range(FRAMES)]


def _conditioned(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "num_frames": FRAMES, "conditioning_frames": _frames(d, size)}


def _sparse() -> Any:
    control = diffusers.SparseControlNetModel(
        block_out_channels=(20, 40), layers_per_block=1, norm_num_groups=5, cross_attention_dim=28,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), attention_head_dim=5,
        motion_num_attention_heads=5, conditioning_embedding_out_channels=(6, 8, 10, 12),
    )  # fmt: skip
    return _moving(diffusers.AnimateDiffSparseControlNetPipeline, controlnet=drawn(control))


def _sparsely(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "num_frames": FRAMES, "conditioning_frames": _frames(d, size)[:1]}


def _again(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "video": _frames(d, size)}


def _video_to_video() -> Any:
    return diffusers.VideoToVideoSDPipeline(
        vae=kl(4), **none("text_encoder", "tokenizer"), unet=MORE["unet_3d"].build(), scheduler=euler()
    )


def _i2vgen() -> Any:
    return diffusers.I2VGenXLPipeline(
        vae=kl(4), **none("text_encoder", "tokenizer"), image_encoder=texts.clip_vision(),
        feature_extractor=texts.clip_pictures(), unet=MORE["unet_i2vgen"].build(), scheduler=_ddim(),
    )  # fmt: skip


def _i2vgen_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "image": photo(d, size), "num_frames": 2}


def _pia() -> Any:
    unet = pictures.sd_unet(in_channels=9)
    return _moving(diffusers.PIAPipeline, unet=unet)


def _pia_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_drawn(d, size), "num_frames": FRAMES}


# ---- without guidance


def _batches(d: Draw, request: int) -> dict[str, Any]:
    """There is nothing to choose: the second request has another seed only."""
    return {}


def _batch(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "batch_size": 2}


def _unconditional(cls: Any, scheduler: Any) -> Any:
    return unets.unconditional(cls, scheduler)


def _score() -> Any:
    return _unconditional(diffusers.ScoreSdeVePipeline, diffusers.ScoreSdeVeScheduler(correct_steps=1, sigma_max=2.0))


def _repaint() -> Any:
    return _unconditional(diffusers.RePaintPipeline, diffusers.RePaintScheduler())


def _repaint_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 24, "width": 24}, {"height": 32, "width": 24})[request]
    mask = torch.zeros(1, 1, size["height"], size["width"])
    mask[..., 12:, :] = 1.0
    return {"image": picture(d, size), "mask_image": mask, "jump_length": 1, "jump_n_sample": 1}


def _consistency() -> Any:
    unet = _unet(24, num_class_embeds=5)
    scheduler = diffusers.CMStochasticIterativeScheduler(sigma_max=2.0)
    return diffusers.ConsistencyModelPipeline(unet=unet, scheduler=scheduler)


def _unet(size: int, **config: Any) -> nn.Module:
    return drawn(
        diffusers.UNet2DModel(
            sample_size=size, block_out_channels=(20, 40), layers_per_block=1, norm_num_groups=5,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **config,
        )
    )  # fmt: skip


def _ldm() -> Any:
    unet = _unet(12, in_channels=4, out_channels=4)
    return diffusers.LDMPipeline(vqvae=unets.movq("group"), unet=unet, scheduler=diffusers.DDIMScheduler())


def _ldm_super() -> Any:
    unet = _unet(24, in_channels=6, out_channels=3)
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=unets.movq("group", 3), unet=unet, scheduler=diffusers.DDIMScheduler(prediction_type=V)
    )


def _ldm_super_arguments(d: Draw, request: int) -> dict[str, Any]:
    return {"image": picture(d, ({"height": 32, "width": 32}, {"height": 32, "width": 64})[request])}


def _dance() -> Any:
    unet = diffusers.UNet1DModel(
        sample_size=64, sample_rate=64, in_channels=2, out_channels=2, extra_in_channels=32,
        block_out_channels=(16, 32, 32), time_embedding_type="fourier", use_timestep_embedding=False,
    )  # fmt: skip
    return diffusers.DanceDiffusionPipeline(unet=drawn(unet), scheduler=diffusers.IPNDMScheduler())


def _seconds(d: Draw, request: int) -> dict[str, Any]:
    return {"audio_length_in_s": (1.0, 0.75)[request]}


# ---- cascades


def _kandinsky22_control() -> Any:
    unet = unets.kandinsky22_unet(8, encoder_hid_dim_type="image_proj", addition_embed_type="image_hint")
    scheduler = diffusers.DDPMScheduler(prediction_type=V, clip_sample=False)
    return diffusers.KandinskyV22ControlnetPipeline(unet=unet, scheduler=scheduler, movq=unets.movq())


def _embedded(d: Draw) -> dict[str, Any]:
    return {"image_embeds": d.normal(1, 28), "negative_image_embeds": d.normal(1, 28)}


def _hinted(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_embedded(d), "hint": picture(d, {name: 4 * length for name, length in size.items()})}


def _kandinsky22_inpaint() -> Any:
    scheduler = diffusers.DDPMScheduler(prediction_type=V, clip_sample=False)
    unet = unets.kandinsky22_unet(9)
    return diffusers.KandinskyV22InpaintPipeline(unet=unet, scheduler=scheduler, movq=unets.movq("group"))


def _kandinsky22_masked(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    mask = torch.zeros(size["height"], size["width"])
    mask[24:, 40:] = 1.0
    return {**_embedded(d), "image": photo(d, size), "mask_image": mask.numpy()}


def _prior_again() -> Any:
    parts = unets.prior().components
    return diffusers.KandinskyV22PriorEmb2EmbPipeline(**parts)


def _prior_arguments(d: Draw, request: int) -> dict[str, Any]:
    return {"prompt": texts.PROMPTS[request], "image": d.normal(1, 22), "strength": 0.5}


def _kandinsky3() -> Any:
    return diffusers.Kandinsky3Img2ImgPipeline(
        tokenizer=None, text_encoder=None, unet=MORE["unet_kandinsky3"].build(), movq=unets.movq(),
        scheduler=diffusers.DDPMScheduler(prediction_type=V, clip_sample=False),
    )  # fmt: skip


def _kandinsky3_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    masks = {"attention_mask": d.mask([9], 13), "negative_attention_mask": d.mask([13], 13)}
    return {**prompts(d), **masks, "image": photo(d, size), "strength": 0.5}


def _if_inpaint() -> Any:
    return unets.deepfloyd(diffusers.IFInpaintingPipeline)


def _if_inpaint_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 32, "width": 48}, {"height": 32, "width": 40})[request]
    return {**_masked(d, size), "clean_caption": False}


def _if_super_again() -> Any:
    return unets.deepfloyd(diffusers.IFImg2ImgSuperResolutionPipeline, 6)


def _if_super_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 32, "width": 32}, {"height": 32, "width": 40})[request]
    low = {"height": 16, "width": 16}
    given = {**prompts(d), "image": picture(d, size), "original_image": picture(d, low), "clean_caption": False}
    return given


def _cascade() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    decoder = diffusers.models.StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=30, block_out_channels=(20, 40),
        num_attention_heads=(5, 5), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), patch_size=2,
        block_types_per_layer=(block, block), clip_text_pooled_in_channels=22, clip_seq=3, effnet_in_channels=6,
    )  # fmt: skip
    return diffusers.StableCascadeDecoderPipeline(
        decoder=drawn(decoder), tokenizer=texts.clip_tokenizer(), text_encoder=texts.clip_text(projected=True),
        vqgan=drawn(PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=12, levels=2, embed_dim=16)),
        scheduler=diffusers.DDPMWuerstchenScheduler(), latent_dim_scale=4.0,
    )  # fmt: skip


def _cascade_arguments(d: Draw, request: int) -> dict[str, Any]:
    sizes = ((5, 7), (4, 6))
    return {"image_embeddings": d.normal(1, 6, *sizes[request]), "prompt": texts.PROMPTS[request]}


# ---- others


def _of_kolors(cls: Any) -> Any:
    return cls(**{**unets.kolors().components, **none("image_encoder", "feature_extractor")})


def _marigold(cls: Any, kind: str, **more: Any) -> Any:
    given = unets.marigold().components
    size = {"default_denoising_steps": 2, "default_processing_resolution": 0}
    return cls(**{**given, **size, "prediction_type": kind, **more})


def _marigold_intrinsics() -> Any:
    unet = pictures.sd_unet(in_channels=12, out_channels=8)
    targets = {"target_names": ["albedo", "material"]}
    return _marigold(diffusers.MarigoldIntrinsicsPipeline, "intrinsics", unet=unet, target_properties=targets)


def _amused(cls: Any) -> Any:
    return cls(**unets.amused().components)


def _amused_arguments(d: Draw, request: int) -> dict[str, Any]:
    return {**_amused_texts(d), "image": picture(d, _AMUSED[request])}


def _amused_masked(d: Draw, request: int) -> dict[str, Any]:
    size = _AMUSED[request]
    mask = torch.zeros(1, 1, size["height"], size["width"])
    mask[..., 8:, :] = 1.0
    return {**_amused_texts(d), "image": picture(d, size), "mask_image": mask}


def _amused_texts(d: Draw) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for sign in ("", "negative_"):
        given[f"{sign}prompt_embeds"] = d.normal(1, 22)
        given[f"{sign}encoder_hidden_states"] = d.normal(1, 13, 28)
    return given


_AMUSED = ({"height": 24, "width": 24}, {"height": 32, "width": 24})

VARIANTS: list[Case] = [
    Case("sd15_controlnet_img2img", partial(_with_control, diffusers.StableDiffusionControlNetImg2ImgPipeline),
         by_size(_controlled, SMALL), MORE_STEPS),
    Case("sd15_controlnet_inpaint", partial(_with_control, diffusers.StableDiffusionControlNetInpaintPipeline),
         by_size(_controlled_masked, SMALL)),
    Case("sd15_depth", lambda: like("sd15", diffusers.StableDiffusionDepth2ImgPipeline, depth_estimator=None,
         unet=pictures.sd_unet(in_channels=5)), _unsized(_depth), MORE_STEPS),
    Case("sd15_variation", _variation, by_size(lambda d, s: {"image": photo(d, s)}, SMALL)),
    Case("lcm_img2img", _lcm, _unsized(lambda d, s: {**prompts(d, negative=False), "image": picture(d, s)}),
         MORE_STEPS),
    Case("sd15_ldm3d", _ldm3d, by_size(lambda d, s: {**prompts(d), "output_type": "np"}, SMALL)),
    Case("sd15_gligen", _gligen, by_size(_gligen_arguments, SMALL)),
    Case("sd15_inpaint_legacy", partial(like, "sd15", diffusers.StableDiffusionInpaintPipelineLegacy,
         scheduler=_ddim()), _unsized(_masked), MORE_STEPS),
    Case("sd15_paradigms", _paradigms, by_size(lambda d, s: prompts(d), SMALL)),
    Case("sd15_safe", partial(_with_text, diffusers.pipelines.deprecated.StableDiffusionPipelineSafe),
         by_size(_prompted, SMALL)),
    Case("sd15_sag", partial(like, "sd15", diffusers.StableDiffusionSAGPipeline, scheduler=_ddim(),
         image_encoder=None), by_size(lambda d, s: prompts(d), SMALL)),
    Case("text_to_video_zero", lambda: _with_text(diffusers.TextToVideoZeroPipeline, scheduler=_ddim()),
         by_size(_zero, SMALL), MORE_STEPS),
    Case("sdxl_controlnet", lambda: _of_xl(diffusers.StableDiffusionXLControlNetPipeline,
         controlnet=_xl_small_control()), by_size(_pooled_drawn, SMALL)),
    Case("sdxl_controlnet_union", lambda: _of_xl(diffusers.StableDiffusionXLControlNetUnionPipeline,
         controlnet=_xl_union()), by_size(_union_arguments, SMALL)),
    Case("sdxl_instruct_pix2pix", lambda: _of_xl(diffusers.StableDiffusionXLInstructPix2PixPipeline,
         unet=_xl_unet(in_channels=8)), by_size(_pooled_drawn, SMALL)),
    Case("sdxl_adapter", _xl_adapter, by_size(_pooled_drawn, SMALL)),
    Case("sdxl_pag", partial(_of_xl, diffusers.StableDiffusionXLPAGPipeline), by_size(_pooled, SMALL)),
    Case("animatediff_sdxl", _moving_xl, by_size(lambda d, s: {**_pooled(d, s), "num_frames": FRAMES}, SMALL)),
    Case("animatediff_controlnet", lambda: _moving(diffusers.AnimateDiffControlNetPipeline,
         controlnet=MORE["unet_controlnet"].build()), by_size(_conditioned, SMALL)),
    Case("animatediff_sparse", _sparse, by_size(_sparsely, SMALL)),
    Case("animatediff_video", partial(_moving, diffusers.AnimateDiffVideoToVideoPipeline), by_size(_again, SMALL),
         MORE_STEPS),
    Case("video_to_video_sd", _video_to_video, _unsized(_again), MORE_STEPS),
    Case("i2vgen", _i2vgen, by_size(_i2vgen_arguments, SMALL)),
    Case("pia", _pia, by_size(_pia_arguments, SMALL)),
    Case("pndm", partial(_unconditional, diffusers.PNDMPipeline, diffusers.PNDMScheduler(skip_prk_steps=True)),
         _batches, 2, _batch),
    Case("score_sde_ve", _score, _batches, 2, _batch),
    Case("karras_ve", partial(_unconditional, diffusers.KarrasVePipeline, diffusers.KarrasVeScheduler(sigma_max=2.0)),
         _batches, 2, _batch),
    Case("repaint", _repaint, _repaint_arguments, 3),
    Case("consistency_model", _consistency, _batches, 2, _batch),
    Case("ldm", _ldm, _batches, 2, _batch),
    Case("ldm_super", _ldm_super, _ldm_super_arguments),
    Case("dance_diffusion", _dance, _seconds, 2, _batch),
    Case("kandinsky22_controlnet", _kandinsky22_control, lambda d, request: {**_hinted(d, SMALL[1]), **SMALL[1]}),
    Case("kandinsky22_inpaint", _kandinsky22_inpaint, by_size(_kandinsky22_masked, SMALL)),
    Case("kandinsky22_prior_again", _prior_again, _prior_arguments, MORE_STEPS),
    Case("kandinsky3_img2img", _kandinsky3, _unsized(_kandinsky3_arguments), MORE_STEPS),
    Case("deepfloyd_if_inpaint", _if_inpaint, _if_inpaint_arguments, MORE_STEPS),
    Case("deepfloyd_if_super_again", _if_super_again, _if_super_arguments, MORE_STEPS),
    Case("kolors_pag", partial(_of_kolors, diffusers.KolorsPAGPipeline), by_size(_pooled, SMALL)),
    Case("marigold_normals", partial(_marigold, diffusers.MarigoldNormalsPipeline, "normals"),
         _unsized(lambda d, s: {"image": picture(d, s)})),
    Case("marigold_intrinsics", _marigold_intrinsics, _unsized(lambda d, s: {"image": picture(d, s)})),
    Case("amused_img2img", partial(_amused, diffusers.AmusedImg2ImgPipeline), _amused_arguments, MORE_STEPS),
    Case("amused_inpaint", partial(_amused, diffusers.AmusedInpaintPipeline), _amused_masked, MORE_STEPS),
    Case("cascade_decoder", _cascade, _cascade_arguments),
]  # fmt: skip
