"""Video, and one of sound."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
from conformance import texts
from conformance.case import Case, repeated
from conformance.parts import CLIP, V, by_size, drawn, euler, flow, kl, like, none, photo, picture, prompts
from torch import Tensor, nn
from zoo.more import MORE
from zoo.pipelines import PIPELINES
from zoo.transformers import Draw

TEXT = none("text_encoder", "tokenizer")
TEXTS = none("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


def _mochi() -> Any:
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
        latent_channels=12, latents_mean=(0.1,) * 12, latents_std=(0.9,) * 12,
    )  # fmt: skip
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=5, attention_head_dim=16, num_layers=3, pooled_projection_dim=44, in_channels=12,
        out_channels=12, text_embed_dim=32, time_embed_dim=22, max_sequence_length=13,
    )  # fmt: skip
    scheduler = flow(invert_sigmas=True)
    return diffusers.MochiPipeline(**TEXT, vae=drawn(vae), transformer=drawn(model), scheduler=scheduler)


def _mochi_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 48, "width": 64}, {"height": 32, "width": 48})[request]
    given = prompts(d, dim=32, lengths=(9, 13))
    masks = {name: value.bool() for name, value in given.items() if "mask" in name}
    return {**given, **masks, **size, "num_frames": 7}


def _allegro() -> Any:
    vae = drawn(
        diffusers.AutoencoderKLAllegro(
            latent_channels=6, layers_per_block=1, norm_num_groups=2, block_out_channels=(4, 4, 8, 8), sample_size=80,
        )
    )  # fmt: skip
    vae.enable_tiling()  # it decodes in no other way
    vae.kernel, vae.stride = (16, 64, 64), (8, 48, 48)
    vae.tile_overlap_t, vae.tile_overlap_h, vae.tile_overlap_w = 8, 16, 16
    scheduler = diffusers.EulerAncestralDiscreteScheduler(prediction_type=V)
    return diffusers.AllegroPipeline(**TEXT, vae=vae, transformer=MORE["allegro"].build(), scheduler=scheduler)


def _allegro_arguments(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 112, "width": 112}, {"height": 64, "width": 112})[request]
    given = {**prompts(d, lengths=(9, 13)), "negative_prompt": None, "clean_caption": False}
    return {**given, **size, "num_frames": 16}


def hunyuan_vae() -> nn.Module:
    """An autoencoder of videos with six latent channels."""
    return drawn(
        diffusers.AutoencoderKLHunyuanVideo(
            block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=6,
        )
    )  # fmt: skip


def hunyuan_denoiser(channels: int, double: int, single: int) -> nn.Module:
    """A denoiser of videos with so many channels coming in and blocks of both kinds."""
    return drawn(
        diffusers.HunyuanVideoTransformer3DModel(
            in_channels=channels, out_channels=6, num_attention_heads=5, attention_head_dim=16, num_layers=double,
            num_single_layers=single, text_embed_dim=28, pooled_projection_dim=22, rope_axes_dim=(4, 4, 8),
        )
    )  # fmt: skip


def _hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        **TEXTS, vae=hunyuan_vae(), transformer=hunyuan_denoiser(6, 2, 3), scheduler=flow(shift=7.0)
    )


def _hunyuan_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, pooled=22, lengths=(9, 13), negative=False), "num_frames": 9}


def _skyreels_hunyuan_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, pooled=22, lengths=(9, 13)), "num_frames": 9, "true_cfg_scale": 3.0}


def _easyanimate() -> Any:
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=6, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
    )  # fmt: skip
    return diffusers.EasyAnimatePipeline(
        **TEXT, vae=drawn(vae), transformer=MORE["easyanimate"].build(), scheduler=flow()
    )


def _easyanimate_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d, lengths=(9, 13)), "num_frames": 9}


def _wan_vace() -> Any:
    config: dict[str, Any] = {
        "num_attention_heads": 5, "attention_head_dim": 14, "in_channels": 6, "out_channels": 6, "text_dim": 28,
        "freq_dim": 22, "ffn_dim": 94, "num_layers": 3, "rope_max_seq_len": 33,
    }  # fmt: skip
    model = diffusers.WanVACETransformer3DModel(vace_layers=[0, 2], vace_in_channels=12 + 64, **config)
    return like("wan", diffusers.WanVACEPipeline, transformer=drawn(model))


def _wan_image() -> Any:
    config: dict[str, Any] = {
        "num_attention_heads": 5, "attention_head_dim": 14, "out_channels": 6, "text_dim": 28, "freq_dim": 22,
        "ffn_dim": 94, "num_layers": 3, "rope_max_seq_len": 33,
    }  # fmt: skip
    model = diffusers.WanTransformer3DModel(in_channels=6 + 4 + 6, **config)
    return like("wan", diffusers.WanImageToVideoPipeline, transformer=drawn(model))


def _plain(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "num_frames": 9}


def _video(d: Draw, size: dict[str, int], frames: int = 9) -> Tensor:
    return d.normal(1, frames, 3, size["height"], size["width"]).sigmoid()


def _from_image(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**_plain(d, size), "image": picture(d, size)}


def _from_video(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "video": _video(d, size)[0]}


def _skyreels() -> Any:
    return like("wan", diffusers.SkyReelsV2Pipeline, transformer=MORE["skyreels"].build())


def _ltx_image(d: Draw, request: int) -> dict[str, Any]:
    size = ({"height": 160, "width": 224}, {"height": 128, "width": 160})[request]
    return {**prompts(d, lengths=(9, 13)), **size, "num_frames": 17, "image": picture(d, size)}


def _cogvideox_image() -> Any:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=5, attention_head_dim=16, in_channels=12, out_channels=6, time_embed_dim=22, num_layers=3,
        text_embed_dim=28, sample_width=14, sample_height=10, sample_frames=17, max_text_seq_length=13,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return like("cogvideox", diffusers.CogVideoXImageToVideoPipeline, transformer=drawn(model))


def _svd() -> Any:
    unet = drawn(
        diffusers.UNetSpatioTemporalConditionModel(
            sample_size=14, block_out_channels=(32, 64), layers_per_block=1, num_attention_heads=(2, 4), num_frames=5,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), cross_attention_dim=28,
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        force_upcast=False,
    )  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        vae=drawn(vae), image_encoder=texts.clip_vision(28, 224, 32), unet=unet,
        feature_extractor=texts.clip_pictures(224),
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type=V, use_karras_sigmas=True, sigma_max=20.0,
                                                   sigma_min=0.01, timestep_type="continuous"),
    )  # fmt: skip


def _svd_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {"image": photo(d, size), "num_frames": 5}


def _animatediff() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(20, 40), motion_layers_per_block=1, motion_norm_num_groups=5, motion_num_attention_heads=5,
        motion_mid_block_layers_per_block=1,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type=V, clip_sample=False)
    return like("sd15", diffusers.AnimateDiffPipeline, motion_adapter=drawn(adapter), scheduler=scheduler)


def _text_to_video() -> Any:
    return diffusers.TextToVideoSDPipeline(vae=kl(4), **TEXT, unet=MORE["unet_3d"].build(), scheduler=euler())


def _small(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    return {**prompts(d), "num_frames": 4}


def cosmos_denoiser(blocks: int) -> nn.Module:
    """A denoiser of so many blocks, of which it is not told what is padding."""
    return drawn(
        diffusers.CosmosTransformer3DModel(
            in_channels=6, out_channels=6, num_attention_heads=5, attention_head_dim=16, num_layers=blocks,
            text_embed_dim=28, adaln_lora_dim=10, max_size=(8, 12, 16), concat_padding_mask=False,
        )
    )  # fmt: skip


def _cosmos() -> Any:
    return diffusers.Cosmos2TextToImagePipeline(
        **TEXT, transformer=cosmos_denoiser(3), vae=PIPELINES["wan"].build().vae,
        scheduler=flow(use_karras_sigmas=True), safety_checker=Passing(),
    )  # fmt: skip


class Passing:
    """A guard that lets everything pass; the pipeline's own needs a package."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _sana_video() -> Any:
    return diffusers.SanaVideoPipeline(
        **TEXT, vae=PIPELINES["wan"].build().vae, transformer=MORE["sana_video"].build(),
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip


def _sana_video_arguments(d: Draw, size: dict[str, int]) -> dict[str, Any]:
    given = {**prompts(d, lengths=(9, 13)), "negative_prompt": None, "frames": 9}
    return {**given, "use_resolution_binning": False}


def _stable_audio() -> Any:
    from diffusers.pipelines.stable_audio import StableAudioProjectionModel

    model = diffusers.StableAudioDiTModel(
        sample_size=83, in_channels=6, num_layers=3, attention_head_dim=16, num_attention_heads=10,
        num_key_value_attention_heads=5, out_channels=6, cross_attention_dim=28, time_proj_dim=22,
        global_states_input_dim=56, cross_attention_input_dim=28,
    )  # fmt: skip
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8,
        decoder_input_channels=6, audio_channels=2, sampling_rate=16,
    )  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=28, conditioning_dim=28, min_value=0, max_value=64)
    return diffusers.StableAudioPipeline(
        vae=drawn(vae), text_encoder=texts.t5(28), tokenizer=texts.t5_tokenizer(), transformer=drawn(model),
        projection_model=drawn(projection),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type=V, sigma_data=1.0),
    )  # fmt: skip


def _stable_audio_arguments(d: Draw, request: int) -> dict[str, Any]:
    return {"prompt": texts.PROMPTS[request], "audio_end_in_s": (30.0, 20.0)[request]}


_BY_32 = ({"height": 96, "width": 128}, {"height": 64, "width": 96})

VIDEOS: list[Case] = [
    Case("mochi", _mochi, _mochi_arguments, pair=repeated),
    Case("allegro", _allegro, _allegro_arguments, pair=repeated),
    Case("hunyuan_video", _hunyuan_video, by_size(_hunyuan_arguments, CLIP), pair=repeated),
    Case("hunyuan_video_true_cfg", _hunyuan_video, by_size(_skyreels_hunyuan_arguments, CLIP), pair=repeated),
    Case("easyanimate", _easyanimate, by_size(_easyanimate_arguments, CLIP), pair=repeated),
    Case("wan_vace", _wan_vace, by_size(_plain, CLIP), pair=repeated),
    Case("wan_image_to_video", _wan_image, by_size(_from_image, CLIP)),
    Case("wan_video_to_video", partial(like, "wan", diffusers.WanVideoToVideoPipeline), by_size(_from_video, CLIP), 4,
         repeated),
    Case("skyreels", _skyreels, by_size(_plain, CLIP)),
    Case("ltx_image_to_video", partial(like, "ltx", diffusers.LTXImageToVideoPipeline), _ltx_image, pair=repeated),
    Case("cogvideox_image_to_video", _cogvideox_image, by_size(_from_image, CLIP), pair=repeated),
    Case("svd", _svd, by_size(_svd_arguments, CLIP)),
    Case("animatediff", _animatediff, by_size(_small, CLIP), pair=repeated),
    Case("text_to_video", _text_to_video, by_size(_small, CLIP), pair=repeated),
    Case("cosmos2", _cosmos, by_size(lambda d, s: prompts(d), CLIP)),
    Case("sana_video", _sana_video, by_size(_sana_video_arguments, _BY_32)),
    Case("stable_audio", _stable_audio, _stable_audio_arguments),
]  # fmt: skip
