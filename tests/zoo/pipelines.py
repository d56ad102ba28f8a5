"""Tiny random diffusers pipelines, built in memory and called with embeddings: real classes, loops, schedulers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn
from zoo.more import MORE
from zoo.transformers import MODELS, Draw, randomise

V = "v_prediction"  # random weights stay of order one under it, unlike noise prediction divided by a small alpha
Arguments = Callable[[Draw], dict[str, Any]]


@dataclass(frozen=True)
class PipelineCase:
    """A pipeline and the arguments of one call. ``latent`` is false where the pipeline only returns pixels.

    ``calls`` is how many times one step calls the denoiser: 2 where guidance is two calls, not a doubled batch.
    """

    name: str
    make: Callable[[], Any]
    arguments: Arguments
    latent: bool = True
    calls: int = 1
    extra: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The pipeline on the CPU in fp32, its progress bar off."""
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, seed: int = 0, steps: int = 2, output: str = "latent", **more: Any) -> Tensor:
        """One generation. ``output`` is "latent" or "np" (pixels in 0..1); ``more`` overrides arguments.

        The global generator is seeded as well: some pipelines encode their control image with it.
        """
        kwargs: dict[str, Any] = {
            **self.arguments(Draw(seed)),
            **self.extra,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": output if self.latent else "np",
            "return_dict": False,
            **more,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            result = pipe(**kwargs)[0]
        return torch.from_numpy(result) if isinstance(result, np.ndarray) else result


def _drawn(model: nn.Module, seed: int = 3) -> nn.Module:
    randomise(model, seed)
    return model.eval().requires_grad_(False)


# ---- autoencoders


def _vae(latent: int, **config: Any) -> nn.Module:
    return _drawn(
        diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8), norm_num_groups=2, latent_channels=latent, sample_size=64, **config,
        )
    )  # fmt: skip


def _vae_cogvideox() -> nn.Module:
    return _drawn(
        diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 8, 8), latent_channels=6, layers_per_block=1, norm_num_groups=2,
            sample_height=80, sample_width=112,
        )
    )  # fmt: skip


def _vae_wan() -> nn.Module:
    return _drawn(
        diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=6, num_res_blocks=1, latents_mean=[0.1] * 6, latents_std=[0.9] * 6,
        )
    )  # fmt: skip


def _vae_qwen() -> nn.Module:
    return _drawn(
        diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=6, num_res_blocks=1, latents_mean=[0.1] * 6, latents_std=[0.9] * 6,
        )
    )  # fmt: skip


def _vae_dc() -> nn.Module:
    blocks = ("ResBlock",) * 5 + ("EfficientViTBlock",)
    return _drawn(
        diffusers.AutoencoderDC(
            latent_channels=6, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=(12,) * 6, decoder_block_out_channels=(12,) * 6, scaling_factor=0.5,
            encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
            encoder_qkv_multiscales=((),) * 5 + ((5,),), decoder_qkv_multiscales=((),) * 5 + ((5,),),
        )
    )  # fmt: skip


def _vae_ltx() -> nn.Module:
    return _drawn(
        diffusers.AutoencoderKLLTXVideo(
            latent_channels=12, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
    )  # fmt: skip


# ---- pipelines


def _flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def _none(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def _flux(model: str) -> Any:
    return diffusers.FluxPipeline(
        scheduler=_flow(shift=3.0, use_dynamic_shifting=True), vae=_vae(3, shift_factor=0.1),
        transformer=MODELS[model].build(), **_none("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )  # fmt: skip


_SD3_TEXT = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")


def _sd3(model: str = "sd3") -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=MODELS[model].build(),
        scheduler=_flow(shift=3.0),
        vae=_vae(6, shift_factor=0.1),
        **_none(*_SD3_TEXT),
    )


def _sd3_controlnet() -> Any:
    return diffusers.StableDiffusion3ControlNetPipeline(
        transformer=MODELS["sd3"].build(), scheduler=_flow(shift=3.0), vae=_vae(6, shift_factor=0.1),
        controlnet=MORE["sd3_controlnet"].build(), **_none(*_SD3_TEXT),
    )  # fmt: skip


def _pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=_vae(4), transformer=MODELS["pixart"].build(),
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type=V),
    )  # fmt: skip


def _hunyuandit() -> Any:
    return diffusers.HunyuanDiTPipeline(
        vae=_vae(4), text_encoder=None, tokenizer=None, transformer=MODELS["hunyuandit"].build(),
        scheduler=diffusers.DDPMScheduler(prediction_type=V, clip_sample=False), safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def _cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=_vae_cogvideox(), transformer=MODELS["cogvideox"].build(),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip


def _latte() -> Any:
    return diffusers.LattePipeline(
        tokenizer=None, text_encoder=None, vae=_vae(4), transformer=MODELS["latte"].build(),
        scheduler=diffusers.DDIMScheduler(prediction_type=V, clip_sample=False),
    )  # fmt: skip


def _wan() -> Any:
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=_vae_wan(), transformer=MODELS["wan_t2v"].build(),
        scheduler=diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip


def _qwenimage() -> Any:
    return diffusers.QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=_vae_qwen(), text_encoder=None, tokenizer=None,
        transformer=MODELS["qwenimage"].build(),
    )  # fmt: skip


def _sana() -> Any:
    return diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=_vae_dc(), transformer=MODELS["sana"].build(),
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )  # fmt: skip


def _dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=MODELS["dit"].build(),
        vae=_vae(4),
        scheduler=diffusers.DPMSolverMultistepScheduler(prediction_type=V),
    )


def _ltx() -> Any:
    return diffusers.LTXPipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=_vae_ltx(), text_encoder=None, tokenizer=None,
        transformer=MORE["ltx"].build(),
    )  # fmt: skip


def _sd15() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_vae(4), text_encoder=None, tokenizer=None, unet=MORE["unet_sd15"].build(),
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type=V, steps_offset=1), safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(4, force_upcast=False), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=MORE["unet_sdxl"].build(), scheduler=diffusers.EulerDiscreteScheduler(prediction_type=V,
        steps_offset=1), add_watermarker=False,
    )  # fmt: skip


# ---- arguments


def _prompts(d: Draw, *, text: int = 13, dim: int = 28, pooled: int = 0, negative: bool = True,
             lengths: tuple[int, int] | None = None, suffix: str = "") -> dict[str, Any]:  # fmt: skip
    """Embeddings (1, text, dim) of a prompt and its negative, with pooled vectors and padding masks where asked."""
    given: dict[str, Any] = {}
    for k, sign in enumerate(("", "negative_") if negative else ("",)):
        given[f"{sign}prompt_embeds{suffix}"] = d.normal(1, text, dim)
        if pooled:
            given[f"{sign}pooled_prompt_embeds"] = d.normal(1, pooled)
        if lengths:
            given[f"{sign}prompt_attention_mask{suffix}"] = d.mask([lengths[k]], text)
    return given


_IMAGE = {"height": 112, "width": 176}
_VIDEO = {"height": 80, "width": 112}


def _sd3_arguments(d: Draw) -> dict[str, Any]:
    return {**_prompts(d, pooled=22), **_IMAGE, "guidance_scale": 5.0}


def _hunyuandit_arguments(d: Draw) -> dict[str, Any]:
    first = _prompts(d, text=11, lengths=(5, 11))
    second = _prompts(d, dim=24, lengths=(7, 13), suffix="_2")
    return {**first, **second, **_IMAGE, "guidance_scale": 5.0, "use_resolution_binning": False}


def _qwenimage_arguments(d: Draw) -> dict[str, Any]:
    masks = {f"{sign}prompt_embeds_mask": d.mask([13], 13) for sign in ("", "negative_")}
    return {**_prompts(d), **masks, **_IMAGE, "true_cfg_scale": 4.0}


_CASES = [
    PipelineCase(
        "flux", partial(_flux, "flux"), lambda d: {**_prompts(d, pooled=22, negative=False), **_IMAGE,
        "guidance_scale": 3.5}
    ),
    PipelineCase(
        "flux_true_cfg", partial(_flux, "flux"), lambda d: {**_prompts(d, pooled=22), **_IMAGE, "true_cfg_scale": 4.0},
        calls=2,
    ),
    PipelineCase("sd3", _sd3, _sd3_arguments),
    PipelineCase(
        "sd3_controlnet", _sd3_controlnet,
        lambda d: {**_sd3_arguments(d), "control_image": d.normal(1, 3, 112, 176).sigmoid(),
                   "controlnet_conditioning_scale": 0.8},
    ),
    PipelineCase(
        "pixart", _pixart,
        lambda d: {**_prompts(d, lengths=(9, 13)), "negative_prompt": None, **_IMAGE, "guidance_scale": 4.5,
                   "use_resolution_binning": False, "clean_caption": False},
    ),
    PipelineCase("hunyuandit", _hunyuandit, _hunyuandit_arguments),
    PipelineCase(
        "cogvideox", _cogvideox, lambda d: {**_prompts(d), **_VIDEO, "num_frames": 17, "guidance_scale": 6.0}
    ),
    PipelineCase(
        "latte", _latte,
        lambda d: {**_prompts(d), **_IMAGE, "negative_prompt": None, "video_length": 5, "guidance_scale": 7.5,
                   "clean_caption": False},
    ),
    PipelineCase(
        "wan", _wan, lambda d: {**_prompts(d), **_VIDEO, "num_frames": 17, "guidance_scale": 5.0}, calls=2,
    ),
    PipelineCase("qwenimage", _qwenimage, _qwenimage_arguments, calls=2),
    PipelineCase(
        "sana", _sana,
        lambda d: {**_prompts(d, lengths=(9, 13)), "negative_prompt": None, "height": 224, "width": 352,
                   "guidance_scale": 4.5, "use_resolution_binning": False, "clean_caption": False},
    ),
    PipelineCase("dit", _dit, lambda d: {"class_labels": [3], "guidance_scale": 4.0}, latent=False),
    PipelineCase(
        "ltx", _ltx,
        lambda d: {**_prompts(d, lengths=(9, 13)), "height": 160, "width": 224, "num_frames": 33,
        "guidance_scale": 3.0},
    ),
    PipelineCase("sd15", _sd15, lambda d: {**_prompts(d), **_IMAGE, "guidance_scale": 7.5}),
    PipelineCase(
        "sdxl", _sdxl, lambda d: {**_prompts(d, pooled=22), "height": 96, "width": 160, "guidance_scale": 5.0},
    ),
]  # fmt: skip

PIPELINES: dict[str, PipelineCase] = {case.name: case for case in _CASES}
