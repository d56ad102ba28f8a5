"""Pipelines of U-Nets: pixels, cascades, priors and decoders."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from conformance import texts
from conformance.case import Case, repeated
from conformance.parts import IMAGE, V, by_size, drawn, euler, kl, like, none, picture, prompts
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torch import nn
from zoo.more import MORE
from zoo.transformers import Draw

_SQUARE = ({"height": 64, "width": 64}, {"height": 96, "width": 64})


def _if_unet(channels: int = 3, **config: Any) -> nn.Module:
    return drawn(
        diffusers.UNet2DConditionModel(
            sample_size=24, layers_per_block=1, block_out_channels=(20, 40), norm_num_groups=5,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4,
            in_channels=channels, out_channels=6, cross_attention_dim=24, encoder_hid_dim=28,
            encoder_hid_dim_type="text_proj", addition_embed_type="text", addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift", act_fn="gelu", only_cross_attention=(True, False), **config,
        )
    )  # fmt: skip


def _if_scheduler() -> Any:
    return diffusers.DDPMScheduler(variance_type="learned_range", prediction_type=V)


_IF = {**none("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")}


def _if() -> Any:
    return diffusers.IFPipeline(**_IF, unet=_if_unet(), scheduler=_if_scheduler(), requires_safety_checker=False)


def _if_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 24, "width": 32}, {"height": 32, "width": 40})[request]
    return {**prompts(d), **size, "clean_caption": False}


def deepfloyd(cls: Any, channels: int = 3) -> Any:
    """A pipeline of pixels; with six channels one that is given a smaller picture as well."""
    more = {"class_embed_type": "timestep"} if channels == 6 else {}
    noising = {"image_noising_scheduler": _if_scheduler()} if channels == 6 else {}
    unet = _if_unet(channels, **more)
    return cls(**_IF, unet=unet, scheduler=_if_scheduler(), **noising, requires_safety_checker=False)


def _if_img2img_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 64, "width": 64}, {"height": 64, "width": 80})[request]
    return {**prompts(d), "image": picture(d, size), "clean_caption": False}


def _if_super_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 24, "width": 32}, {"height": 32, "width": 40})[request]
    return {**prompts(d), **size, "image": picture(d, {"height": 16, "width": 16}), "clean_caption": False}


def kandinsky22_unet(channels: int = 4, **config: Any) -> nn.Module:
    """A small U-Net that is conditioned on the embedding of a picture."""
    return drawn(
        diffusers.UNet2DConditionModel(
            sample_size=24, layers_per_block=1, block_out_channels=(20, 40), norm_num_groups=5,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), attention_head_dim=4,
            in_channels=channels, out_channels=8, cross_attention_dim=24, encoder_hid_dim=28,
            resnet_time_scale_shift="scale_shift",
            **{"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image", **config},
        )
    )  # fmt: skip


def movq(norm: str = "spatial", latent: int = 4) -> nn.Module:
    """As it is initialised: its norms of norms magnify rounding with weights that are drawn larger."""
    model = diffusers.VQModel(
        block_out_channels=(32, 32), norm_num_groups=8, latent_channels=latent, num_vq_embeddings=12,
        vq_embed_dim=latent, norm_type=norm,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def _kandinsky22(cls: Any) -> Any:
    scheduler = diffusers.DDPMScheduler(prediction_type=V, clip_sample=False)
    return cls(unet=kandinsky22_unet(), scheduler=scheduler, movq=movq())


def _kandinsky22_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {"image_embeds": d.normal(1, 28), "negative_image_embeds": d.normal(1, 28)}


def _kandinsky22_img2img(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_kandinsky22_arguments(d, size), "image": picture(d, size), "strength": 0.5}


def prior() -> Any:
    """The pipeline that makes embeddings of pictures from prompts."""
    prior = drawn(
        diffusers.PriorTransformer(num_attention_heads=5, attention_head_dim=12, num_layers=3, embedding_dim=22,
                                   num_embeddings=32, additional_embeddings=4)
    )  # fmt: skip
    return diffusers.KandinskyV22PriorPipeline(
        prior=prior, image_encoder=texts.clip_vision(22), text_encoder=texts.clip_text(22, projected=True),
        tokenizer=texts.clip_tokenizer(), image_processor=texts.clip_pictures(),
        scheduler=diffusers.UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log"),
    )  # fmt: skip


def _kandinsky3() -> Any:
    return diffusers.Kandinsky3Pipeline(
        tokenizer=None, text_encoder=None, unet=MORE["unet_kandinsky3"].build(), movq=movq(),
        scheduler=diffusers.DDPMScheduler(prediction_type=V, clip_sample=False),
    )  # fmt: skip


def _kandinsky3_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    masks = {"attention_mask": d.mask([9], 13), "negative_attention_mask": d.mask([13], 13)}
    return {**prompts(d), **masks}


def _calm(last: nn.Module) -> None:
    """Half of what these models put out divides the other: keep it away from where that has no bound."""
    for weight in last.parameters():
        weight.data.mul_(0.1)


def _wuerstchen_prior() -> Any:
    prior = drawn(WuerstchenPrior(c_in=4, c=20, c_cond=28, c_r=16, depth=2, nhead=5))
    _calm(prior.out[1])
    return diffusers.WuerstchenPriorPipeline(
        tokenizer=texts.clip_tokenizer(), text_encoder=texts.clip_text(), prior=prior,
        scheduler=diffusers.DDPMWuerstchenScheduler(),
    )  # fmt: skip


def _wuerstchen_decoder() -> Any:
    decoder = drawn(WuerstchenDiffNeXt(
        c_hidden=[20, 40], c_r=16, c_cond=28, clip_embd=28, nhead=[-1, 4], blocks=[1, 1], level_config=["CT", "CTA"],
        inject_effnet=[False, True], effnet_embd=4,
    ))  # fmt: skip
    _calm(decoder.clf[1])
    vqgan = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=12, levels=2, embed_dim=16)
    return diffusers.WuerstchenDecoderPipeline(
        tokenizer=texts.clip_tokenizer(), text_encoder=texts.clip_text(), decoder=decoder, vqgan=drawn(vqgan),
        scheduler=diffusers.DDPMWuerstchenScheduler(), latent_dim_scale=4.0,
    )  # fmt: skip


def _wuerstchen_arguments(d: Draw, request: int) -> dict[str, Any]:
    sizes = ((5, 7), (4, 6))
    return {
        "image_embeddings": d.normal(1, 4, *sizes[request]),
        "prompt": texts.PROMPTS[request],
        "guidance_scale": 3.0,
    }


def _cascade_prior() -> Any:
    return diffusers.StableCascadePriorPipeline(
        tokenizer=texts.clip_tokenizer(), text_encoder=texts.clip_text(projected=True),
        prior=MORE["unet_cascade"].build(),
        scheduler=diffusers.DDPMWuerstchenScheduler(), resolution_multiple=16,
    )  # fmt: skip


def _prior_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 384, "width": 512}, {"height": 256, "width": 384})[request]
    return {"prompt": texts.PROMPTS[request], **size}


def _cascade_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 224, "width": 160}, {"height": 192, "width": 128})[request]
    return {"prompt": texts.PROMPTS[request], **size}


def _prompted_twice(given: dict[str, Any]) -> dict[str, Any]:
    return {**repeated(given), "prompt": [given["prompt"]] * 2}


def kolors() -> Any:
    """A U-Net that projects its text."""
    unet = drawn(
        diffusers.UNet2DConditionModel(
            sample_size=24, layers_per_block=1, block_out_channels=(20, 40), norm_num_groups=5,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(2, 4), cross_attention_dim=24,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=22 + 6 * 8, encoder_hid_dim=28, encoder_hid_dim_type="text_proj",
        )
    )  # fmt: skip
    return diffusers.KolorsPipeline(vae=kl(4), text_encoder=None, tokenizer=None, unet=unet, scheduler=euler())


def unconditional(cls: Any, scheduler: Any) -> Any:
    """A pipeline that is not told what to make."""
    unet = diffusers.UNet2DModel(
        sample_size=24, block_out_channels=(20, 40), layers_per_block=1, norm_num_groups=5,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return cls(unet=drawn(unet), scheduler=scheduler)


def _batches(d: Draw, request: int) -> dict[str, Any]:
    """There is nothing to choose: the second request has another seed only."""
    return {}


def _batch(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "batch_size": 2}


def marigold() -> Any:
    """A U-Net that sees a picture and makes its depth."""
    unet = drawn(
        diffusers.UNet2DConditionModel(
            sample_size=24, layers_per_block=1, block_out_channels=(20, 40), norm_num_groups=5, in_channels=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=28, attention_head_dim=5,
        )
    )  # fmt: skip
    return diffusers.MarigoldDepthPipeline(
        unet=unet, vae=kl(4), scheduler=diffusers.DDIMScheduler(prediction_type=V, clip_sample=False),
        text_encoder=texts.clip_text(), tokenizer=texts.clip_tokenizer(), prediction_type="depth",
        default_denoising_steps=2, default_processing_resolution=0,
    )  # fmt: skip


def _marigold_arguments(d: Draw, request: int) -> dict[str, Any]:
    return {"image": picture(d, IMAGE[request])}


def _pag() -> Any:
    return like("sd15", diffusers.StableDiffusionPAGPipeline)


def _panorama() -> Any:
    scheduler = diffusers.DDIMScheduler(prediction_type=V, clip_sample=False)
    return like("sd15", diffusers.StableDiffusionPanoramaPipeline, scheduler=scheduler)


def amused() -> Any:
    """A transformer of masked tokens."""
    transformer = diffusers.UVit2DModel(
        hidden_size=60, cond_embed_dim=22, micro_cond_encode_dim=6, micro_cond_embed_dim=30, encoder_hidden_size=28,
        vocab_size=40, codebook_size=32, in_channels=20, block_out_channels=20, num_res_blocks=2, block_num_heads=5,
        num_hidden_layers=3, num_attention_heads=5, intermediate_size=94, sample_size=8,
    )  # fmt: skip
    vqvae = diffusers.VQModel(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=6, num_vq_embeddings=32, vq_embed_dim=6,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        lookup_from_codebook=True,
    )  # fmt: skip
    return diffusers.AmusedPipeline(
        vqvae=drawn(vqvae), tokenizer=None, text_encoder=None, transformer=drawn(transformer),
        scheduler=diffusers.AmusedScheduler(mask_token_id=39),
    )  # fmt: skip


def _amused_arguments(d: Draw, request: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for sign in ("", "negative_"):
        given[f"{sign}prompt_embeds"] = d.normal(1, 22)
        given[f"{sign}encoder_hidden_states"] = d.normal(1, 13, 28)
    return {**given, "height": (24, 32)[request], "width": 24}


UNETS: list[Case] = [
    Case("deepfloyd_if", _if, _if_arguments),
    Case("deepfloyd_if_img2img", partial(deepfloyd, diffusers.IFImg2ImgPipeline), _if_img2img_arguments, 4),
    Case("deepfloyd_if_super", partial(deepfloyd, diffusers.IFSuperResolutionPipeline, 6), _if_super_arguments),
    Case("kandinsky22", partial(_kandinsky22, diffusers.KandinskyV22Pipeline),
         by_size(_kandinsky22_arguments, _SQUARE)),
    Case("kandinsky22_img2img", partial(_kandinsky22, diffusers.KandinskyV22Img2ImgPipeline),
         by_size(_kandinsky22_img2img, _SQUARE), 4),
    Case("kandinsky22_prior", prior, lambda d, request: {"prompt": texts.PROMPTS[request]}),
    Case("kandinsky3", _kandinsky3, by_size(_kandinsky3_arguments, _SQUARE)),
    Case("wuerstchen_prior", _wuerstchen_prior, _prior_arguments),
    Case("wuerstchen_decoder", _wuerstchen_decoder, _wuerstchen_arguments, pair=_prompted_twice),
    Case("cascade_prior", _cascade_prior, _cascade_arguments),
    Case("kolors", kolors, by_size(lambda d, s: prompts(d, pooled=22), ({"height": 96, "width": 160},
         {"height": 80, "width": 144})), pair=repeated),
    Case("ddpm", partial(unconditional, diffusers.DDPMPipeline, diffusers.DDPMScheduler()), _batches, pair=_batch),
    Case("ddim", partial(unconditional, diffusers.DDIMPipeline, diffusers.DDIMScheduler()), _batches, pair=_batch),
    Case("marigold", marigold, _marigold_arguments),
    Case("sd15_pag", _pag, by_size(lambda d, s: prompts(d))),
    Case("sd3_pag", partial(like, "sd3", diffusers.StableDiffusion3PAGPipeline),
         by_size(lambda d, s: prompts(d, pooled=22)), pair=repeated),
    Case("sd15_panorama", _panorama, by_size(lambda d, s: prompts(d), ({"height": 192, "width": 256},
         {"height": 192, "width": 224}))),
    Case("amused", amused, _amused_arguments),
]  # fmt: skip
