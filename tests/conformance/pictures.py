"""From a picture, or under the control of one: variants of pipelines of the zoo."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from conformance.case import Case, repeated
from conformance.parts import IMAGE, MORE_STEPS, V, by_size, drawn, kl, like, lower_right, picture, prompts
from torch import nn
from zoo.more import MORE
from zoo.pipelines import PIPELINES
from zoo.transformers import Draw


def _pooled(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, pooled=22), "image": picture(d, size)}


def _flux(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, pooled=22, negative=False), "image": picture(d, size)}


def _inpainted(make: Any) -> Any:
    return lambda d, size: {**make(d, size), "mask_image": lower_right(size)}


def _sized(make: Any, *drop: str) -> Any:
    """Arguments of a pipeline that takes the sizes of its picture."""
    return lambda d, request: make(d, IMAGE[request])


def _kontext(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_flux(d, size), "_auto_resize": False, "max_area": size["height"] * size["width"]}


def of_flux(cls: Any, channels: int = 16, **more: Any) -> Any:
    """Latents of four channels: pipelines take a picture of as many channels as its latents for latents."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=channels, out_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=18,
        num_attention_heads=5, joint_attention_dim=28, pooled_projection_dim=22, guidance_embeds=True,
        axes_dims_rope=(4, 6, 8),
    )  # fmt: skip
    return like("flux", cls, transformer=drawn(transformer), vae=kl(4, shift_factor=0.1), **more)


def _of_sd3(cls: Any, **more: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=24, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=12, num_attention_heads=5,
        joint_attention_dim=28, caption_projection_dim=60, pooled_projection_dim=22, pos_embed_max_size=15,
    )  # fmt: skip
    return like("sd3", cls, transformer=drawn(transformer), vae=kl(16, shift_factor=0.1), **more)


def _controlled(make: Any) -> Any:
    def arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
        given = make(d, size)
        image = given.pop("image")
        return {**given, "control_image": image}

    return arguments


def _qwen(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    masks = {f"{sign}prompt_embeds_mask": d.mask([13], 13) for sign in ("", "negative_")}
    return {**prompts(d), **masks, "image": picture(d, size)}


def _sd(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "image": picture(d, size)}


def sd_unet(**config: Any) -> nn.Module:
    """A small U-Net of two blocks, conditioned on text of 28 channels."""
    sizes: dict[str, Any] = {
        "sample_size": 24, "layers_per_block": 1, "block_out_channels": (20, 40), "norm_num_groups": 5,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 28, "attention_head_dim": 5,
    }  # fmt: skip
    return drawn(diffusers.UNet2DConditionModel(**{**sizes, **config}))


def _pix2pix() -> Any:
    return like("sd15", diffusers.StableDiffusionInstructPix2PixPipeline, unet=sd_unet(in_channels=8))


def _lcm() -> Any:
    unet = sd_unet(time_cond_proj_dim=24)
    scheduler = diffusers.LCMScheduler(prediction_type=V)
    return like("sd15", diffusers.LatentConsistencyModelPipeline, unet=unet, scheduler=scheduler)


def _sd_controlnet() -> Any:
    return like("sd15", diffusers.StableDiffusionControlNetPipeline, controlnet=MORE["unet_controlnet"].build())


def _flux_controlnet() -> Any:
    controlnet = diffusers.FluxControlNetModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=18, num_attention_heads=5,
        joint_attention_dim=28, pooled_projection_dim=22, guidance_embeds=True, axes_dims_rope=[4, 6, 8],
    )  # fmt: skip
    return of_flux(diffusers.FluxControlNetPipeline, controlnet=drawn(controlnet))


def _hunyuandit_controlnet() -> Any:
    controlnet = MORE["hunyuandit_controlnet"].build()
    return like("hunyuandit", diffusers.HunyuanDiTControlNetPipeline, controlnet=controlnet)


def _hunyuandit_arguments(d: Draw, request: int) -> dict[str, Any]:
    given = {**PIPELINES["hunyuandit"].arguments(d), **IMAGE[request]}
    return {**given, "control_image": picture(d, IMAGE[request])}


def _qwenimage_controlnet() -> Any:
    controlnet = MORE["qwenimage_controlnet"].build()
    return like("qwenimage", diffusers.QwenImageControlNetPipeline, controlnet=controlnet)


def _sana_controlnet() -> Any:
    return like("sana", diffusers.SanaControlNetPipeline, controlnet=MORE["sana_controlnet"].build())


def _sana_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given = {**prompts(d, lengths=(9, 13)), "negative_prompt": None, "control_image": picture(d, size)}
    return {**given, "use_resolution_binning": False}


def _adapter() -> Any:
    adapter = diffusers.T2IAdapter(channels=[20, 40], num_res_blocks=1, downscale_factor=8)
    return like("sd15", diffusers.StableDiffusionAdapterPipeline, adapter=drawn(adapter))


def _upscale() -> Any:
    unet = sd_unet(in_channels=7, num_class_embeds=1000)
    low = diffusers.DDPMScheduler()
    return like("sd15", diffusers.StableDiffusionUpscalePipeline, unet=unet, low_res_scheduler=low)


def _small(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 14, "width": 22}, {"height": 10, "width": 18})[request]
    return {**prompts(d), "image": picture(d, size)}


PICTURES: list[Case] = [
    Case("flux_img2img", partial(of_flux, diffusers.FluxImg2ImgPipeline), by_size(_flux), MORE_STEPS),
    Case("flux_inpaint", partial(of_flux, diffusers.FluxInpaintPipeline), by_size(_inpainted(_flux)), MORE_STEPS),
    Case("flux_kontext", partial(of_flux, diffusers.FluxKontextPipeline), by_size(_kontext)),
    Case("flux_control", partial(of_flux, diffusers.FluxControlPipeline, 32), by_size(_controlled(_flux))),
    Case("flux_fill", partial(of_flux, diffusers.FluxFillPipeline, 16 + 16 + 256), by_size(_inpainted(_flux))),
    Case("flux_controlnet", _flux_controlnet, by_size(_controlled(_flux))),
    Case("sd3_img2img", partial(like, "sd3", diffusers.StableDiffusion3Img2ImgPipeline), by_size(_pooled), MORE_STEPS,
         repeated),
    Case("sd3_inpaint", partial(_of_sd3, diffusers.StableDiffusion3InpaintPipeline), by_size(_inpainted(_pooled)),
         MORE_STEPS, repeated),
    Case("qwenimage_img2img", partial(like, "qwenimage", diffusers.QwenImageImg2ImgPipeline), by_size(_qwen),
         MORE_STEPS),
    Case("qwenimage_controlnet", _qwenimage_controlnet, by_size(_controlled(_qwen))),
    Case("sana_controlnet", _sana_controlnet, by_size(_sana_arguments, ({"height": 224, "width": 352},
         {"height": 160, "width": 288}))),
    Case("hunyuandit_controlnet", _hunyuandit_controlnet, _hunyuandit_arguments, pair=repeated),
    Case("sd15_img2img", partial(like, "sd15", diffusers.StableDiffusionImg2ImgPipeline), _sized(_sd), MORE_STEPS),
    Case("sd15_inpaint", partial(like, "sd15", diffusers.StableDiffusionInpaintPipeline), by_size(_inpainted(_sd))),
    Case("sd15_controlnet", _sd_controlnet, by_size(_sd)),
    Case("sd15_adapter", _adapter, by_size(_sd)),
    Case("sd15_upscale", _upscale, _small),
    Case("instruct_pix2pix", _pix2pix, _sized(_sd)),
    Case("lcm", _lcm, by_size(lambda d, s: prompts(d, negative=False))),
    Case("sdxl_img2img", partial(like, "sdxl", diffusers.StableDiffusionXLImg2ImgPipeline),
         _sized(_pooled), 8),
    Case("sdxl_inpaint", partial(like, "sdxl", diffusers.StableDiffusionXLInpaintPipeline),
         by_size(_inpainted(_pooled), ({"height": 96, "width": 160}, {"height": 80, "width": 144})), MORE_STEPS),
]  # fmt: skip
