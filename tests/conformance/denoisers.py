"""Denoisers and control nets that no pipeline here reaches, by themselves; a case has the name of its class."""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from conformance.alone import Alone, of_zoo
from conformance.parts import drawn
from torch import nn
from zoo.call import DIM, HEADS, PROMPT, TEXT, mask, normal, time
from zoo.call import call as called
from zoo.more import MORE
from zoo.transformers import Draw
from zoo.unets import controlnet as control_inputs
from zoo.unets import unet as unet_inputs

IMAGE = {"hidden_states": {2: 10}}
"""An image of 10 of 14 rows."""
FRAMES = {"hidden_states": {3: 8, 4: 10}}
"""A video of 8 of 10 rows, 10 of 14 columns."""
PACKED = {"hidden_states": {1: 63}, "img_ids": {0: 63}}
"""63 of 77 tokens."""


def _anyflow_far() -> nn.Module:
    return drawn(
        diffusers.AnyFlowFARTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=14, in_channels=6, out_channels=6, text_dim=DIM, freq_dim=22,
            ffn_dim=94, num_layers=2, rope_max_seq_len=33, chunk_partition=(1, 2, 2), full_chunk_limit=3,
        )
    )  # fmt: skip


def _dreamlite_2d() -> nn.Module:
    return drawn(
        diffusers.DreamLiteTransformer2DModel(
            num_attention_heads=HEADS, attention_head_dim=8, in_channels=20, num_layers=2, norm_num_groups=4,
            cross_attention_dim=DIM, use_linear_projection=True, qk_norm="rms_norm",
        )
    )  # fmt: skip


def _dreamlite_unet() -> nn.Module:
    return drawn(
        diffusers.DreamLiteUNetModel(
            sample_size=24, layers_per_block=1, block_out_channels=(20, 40), norm_num_groups=5,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), cross_attention_dim=DIM,
            attention_head_dim=5, use_linear_projection=True,
        )
    )  # fmt: skip


def _joyimage_plus() -> nn.Module:
    return drawn(
        diffusers.JoyImageEditPlusTransformer3DModel(
            in_channels=6, hidden_size=80, num_attention_heads=HEADS, text_dim=DIM, num_layers=2,
            rope_dim_list=[4, 4, 8],
        )
    )  # fmt: skip


def _joyimage_plus_inputs(d: Draw, b: int) -> Any:
    return called(
        d, b, hidden_states=normal(55, 6, 1, 2, 2), timestep=time(701.0), encoder_hidden_states=PROMPT,
        encoder_hidden_states_mask=mask(9, 13), shape_list=[[(1, 5, 7), (1, 4, 5)]] * b,
    )  # fmt: skip


def _kandinsky6_sr() -> nn.Module:
    return drawn(
        diffusers.Kandinsky6SRTransformer3DModel(
            in_visual_dim=6, out_visual_dim=6, time_dim=24, model_dim=80, ff_dim=94, num_visual_blocks=2,
            axes_dims=(4, 4, 8), tile_sizes=((128, 128),),
        )
    )  # fmt: skip


def _rvq_decoder() -> nn.Module:
    return drawn(
        diffusers.MiniMaxMusic3RVQDepthDecoder(
            hidden_size=40, num_layers=2, num_attention_heads=HEADS, intermediate_size=62, audio_vocab_size=30,
            num_codebooks=3,
        )
    )  # fmt: skip


def _sana_wm() -> nn.Module:
    """One of its attentions is in bfloat16, whose rounding shows with weights that are drawn larger."""
    model = diffusers.SanaWMTransformer3DModel(
        in_channels=6, num_layers=2, hidden_size=80, num_attention_heads=HEADS, softmax_every_n=2, linear_head_dim=16,
        caption_channels=DIM, chunk_plucker_post_attn_blocks=2, chunk_plucker_channels=6, image_size=64,
    )  # fmt: skip
    own = {name: weight.clone() for name, weight in model.named_parameters()}
    for name, weight in drawn(model).named_parameters():
        weight.data.copy_(0.1 * weight + own[name])
    return model


def _control_union() -> nn.Module:
    return drawn(
        diffusers.ControlNetUnionModel(
            block_out_channels=(20, 40), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            norm_num_groups=5, cross_attention_dim=DIM, attention_head_dim=5, num_trans_channel=20, num_trans_head=2,
            num_proj_channel=20, conditioning_embedding_out_channels=(6, 8, 10, 12), num_control_type=3,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=22 + 6 * 8,
        )
    )  # fmt: skip


def _control_union_inputs(d: Draw, b: int, *, h: int = 12, w: int = 20) -> Any:
    args, kwargs = unet_inputs(d, b, h=h, w=w, text=TEXT, dim=DIM, pooled=22)
    conditions = [d.normal(b, 3, 8 * h, 8 * w) for _ in range(2)]
    more = {"controlnet_cond": conditions, "control_type": d.put(torch.tensor([[1.0, 0.0, 1.0]] * b))}
    return args, {**kwargs, **more, "control_type_idx": [0, 2], "conditioning_scale": [0.8, 0.6]}


def _control_unions_inputs(d: Draw, b: int) -> Any:
    args, kwargs = _control_union_inputs(d, b)
    doubled = ("controlnet_cond", "control_type", "control_type_idx", "conditioning_scale")
    return args, {name: [value, value] if name in doubled else value for name, value in kwargs.items()}


_XS: dict[str, Any] = {
    "sample_size": 24, "block_out_channels": (20, 40), "cross_attention_dim": DIM,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}  # fmt: skip


def _control_xs() -> nn.Module:
    return drawn(
        diffusers.UNetControlNetXSModel(
            **_XS, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=5, num_attention_heads=5,
            ctrl_block_out_channels=(12, 16), ctrl_num_attention_heads=2, ctrl_max_norm_num_groups=4,
            ctrl_conditioning_embedding_out_channels=(6, 8, 10, 12),
        )
    )  # fmt: skip


def _control_xs_inputs(d: Draw, b: int) -> Any:
    args, kwargs = control_inputs(d, b, h=12, w=20, text=TEXT, dim=DIM)
    return args, {name: value for name, value in kwargs.items() if name != "guess_mode"}


def _cosmos3() -> nn.Module:
    return drawn(
        diffusers.Cosmos3OmniTransformer(
            head_dim=16, hidden_size=80, intermediate_size=94, latent_channel=6, patch_latent_dim=24,
            num_attention_heads=10, num_key_value_heads=5, num_hidden_layers=2, vocab_size=50,
            rope_axes_dim=(4, 2, 2),
        )
    )  # fmt: skip


def _cosmos3_inputs(d: Draw, b: int, *, frames: int = 3, h: int = 5, w: int = 7) -> Any:
    """Text, then the patches of one video; there is no batch."""
    tokens, vision = frames * h * w, torch.arange(TEXT, TEXT + frames * h * w)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(h), torch.arange(w)).T + TEXT
    return (), {
        "input_ids": d.put(torch.randint(50, (TEXT,), generator=d.generator)), "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([torch.arange(TEXT).expand(3, -1), grid], 1).float(), "und_len": TEXT,
        "sequence_length": TEXT + tokens, "vision_tokens": [d.normal(1, 6, frames, 2 * h, 2 * w)],
        "vision_token_shapes": [(frames, h, w)], "vision_sequence_indexes": vision, "vision_mse_loss_indexes": vision,
        "vision_timesteps": d.full(tokens, 701.0), "vision_noisy_frame_indexes": [torch.arange(frames)],
    }  # fmt: skip


def _refiner() -> nn.Module:
    return drawn(
        diffusers.SanaWMLTX2RefinerTransformer3DModel(
            in_channels=12, out_channels=12, num_attention_heads=HEADS, attention_head_dim=12, cross_attention_dim=60,
            audio_in_channels=10, audio_out_channels=10, audio_num_attention_heads=HEADS, audio_attention_head_dim=6,
            audio_cross_attention_dim=30, num_layers=2, caption_channels=DIM,
        )
    )  # fmt: skip


def _refiner_inputs(d: Draw, b: int) -> Any:
    rotary = _refiner().build_rotary_emb_for_absolute_positions(b, [0, 1, 2], 5, 7, torch.device("cpu"), 24.0)
    return called(
        d, b, hidden_states=normal(105, 12), encoder_hidden_states=PROMPT, video_rotary_emb=rotary,
        timestep=lambda d, b: d.full(b * 105, 701.0).view(b, 105), encoder_attention_mask=mask(7, 13),
    )  # fmt: skip


def _several(one: nn.Module, many: Any) -> nn.Module:
    return many([one, drawn(type(one)(**one.config), 5)])


def _both(name: str, *numbers: str) -> Any:
    """The inputs of one control net for two: conditions and scales are lists."""

    def feed(d: Draw, b: int) -> Any:
        args, kwargs = MORE[name].feed(d, b)
        kwargs["controlnet_cond"] = [kwargs["controlnet_cond"], kwargs["controlnet_cond"] * 0.5]
        kwargs["conditioning_scale"] = [0.8, 0.6]
        for key in numbers:
            kwargs[key] = [d.steps(b, 0), d.steps(b, 1)]
        return args, kwargs

    return feed


MODULES: list[Alone] = [
    of_zoo("AceStepTransformer1DModel", MORE["ace_step"], {"hidden_states": {1: 61}, "context_latents": {1: 61}}),
    Alone("AnyFlowFARTransformer3DModel", _anyflow_far, partial(called,
          hidden_states=normal(5, 6, 8, 12), timestep=lambda d, b: d.full(b * 5, 701).view(b, 5),
          r_timestep=lambda d, b: d.full(b * 5, 301).view(b, 5), encoder_hidden_states=PROMPT,
          chunk_partition=(1, 2, 2)), {"hidden_states": {3: 4}}),
    of_zoo("BriaFiboTransformer2DModel", MORE["bria_fibo"], PACKED),
    of_zoo("BriaFibo2Transformer2DModel", MORE["bria_fibo2"], IMAGE),
    of_zoo("ConsisIDTransformer3DModel", MORE["consisid"], {}),
    Alone("DreamLiteTransformer2DModel", _dreamlite_2d, partial(called, hidden_states=normal(20, 7, 11),
          encoder_hidden_states=PROMPT, encoder_attention_mask=mask(7, 13)), {"hidden_states": {2: 5}}, 2),
    Alone("DreamLiteUNetModel", _dreamlite_unet, partial(unet_inputs, h=12, w=20, text=TEXT, dim=DIM), {0: {2: 8}}, 2),
    of_zoo("Flux3Transformer2DModel", MORE["flux3"], {"hidden_states": {1: 55}, "img_ids": {0: 55}}),
    of_zoo("HeliosTransformer3DModel", MORE["helios"], {}),
    of_zoo("HunyuanVideoFramepackTransformer3DModel", MORE["framepack"], {}),
    of_zoo("Ideogram4Transformer2DModel", MORE["ideogram4"], {}),
    of_zoo("JoyImageEditTransformer3DModel", MORE["joyimage"], FRAMES),
    Alone("JoyImageEditPlusTransformer3DModel", _joyimage_plus, _joyimage_plus_inputs, {}, 2),
    of_zoo("Kandinsky6Transformer3DModel", MORE["kandinsky6"], {}),
    Alone("Kandinsky6SRTransformer3DModel", _kandinsky6_sr, partial(called, hidden_states=normal(3, 8, 8, 13),
          timestep=time(701.0)), {}),
    of_zoo("LTX2VideoTransformer3DModel", MORE["ltx2"], {}),
    of_zoo("LongCatAudioDiTTransformer", MORE["longcat_audio"], {"hidden_states": {1: 71}, "latent_cond": {1: 71},
           "attention_mask": {1: 71}}),
    of_zoo("LongCatImageTransformer2DModel", MORE["longcat"], PACKED),
    of_zoo("MiniMaxH3Transformer3DModel", MORE["minimax_h3"], {}),
    of_zoo("MiniMaxMusic3Transformer1DModel", MORE["minimax_music"], {"hidden_states": {2: 61},
           "encoder_hidden_states": {1: 61}}),
    Alone("MiniMaxMusic3RVQDepthDecoder", _rvq_decoder, partial(called, inputs_embeds=normal(4, 40), return_dict=None),
          {"inputs_embeds": {1: 3}}),
    of_zoo("OmniGenTransformer2DModel", MORE["omnigen"], {}),
    of_zoo("QwenImage21Transformer2DModel", MORE["qwenimage21"], {}),
    Alone("SanaWMTransformer3DModel", _sana_wm, partial(called, hidden_states=normal(6, 3, 6, 10),
          timestep=lambda d, b: d.full(b * 3, 701.0).view(b, 1, 3),
          encoder_hidden_states=normal(1, TEXT, DIM), mask=mask(7, 13)), {"hidden_states": {3: 4}}, 2),
    of_zoo("StableAudio3DiTModel", MORE["stable_audio3"], {"hidden_states": {2: 61}, "local_add_cond": {2: 61}}),
    of_zoo("T5FilmDecoder", MORE["t5film"], {}),
    of_zoo("Transformer2DModel", MORE["transformer_2d"], {"hidden_states": {2: 5}}),
    of_zoo("TransformerTemporalModel", MORE["temporal"], {"hidden_states": {2: 5}}),
    of_zoo("WanAnimateTransformer3DModel", MORE["wan_animate"], {}),
    Alone("UNetControlNetXSModel", _control_xs, _control_xs_inputs, {0: {2: 8}, "controlnet_cond": {2: 64}}, 2),
    Alone("Cosmos3OmniTransformer", _cosmos3, _cosmos3_inputs, {}),
    Alone("SanaWMLTX2RefinerTransformer3DModel", _refiner, _refiner_inputs, {}),
    Alone("HunyuanDiT2DMultiControlNetModel", lambda: _several(MORE["hunyuandit_controlnet"].build(),
          diffusers.models.controlnets.HunyuanDiT2DMultiControlNetModel), _both("hunyuandit_controlnet"), {}, 2, True),
    Alone("QwenImageMultiControlNetModel", lambda: diffusers.QwenImageMultiControlNetModel(
          [MORE["qwenimage_controlnet"].build()]), _both("qwenimage_controlnet"), {}, 1, True),
    Alone("MultiControlNetUnionModel", lambda: _several(_control_union(),
          diffusers.models.controlnets.multicontrolnet_union.MultiControlNetUnionModel), _control_unions_inputs, {}, 2,
          True),
    Alone("SD3MultiControlNetModel", lambda: _several(MORE["sd3_controlnet"].build(),
          diffusers.SD3MultiControlNetModel), _both("sd3_controlnet"), {}, 2, True),
    Alone("FluxMultiControlNetModel", lambda: _several(MORE["flux_controlnet"].build(),
          diffusers.FluxMultiControlNetModel), _both("flux_controlnet", "controlnet_mode"), {}, 1, True),
    Alone("MultiControlNetModel", lambda: _several(MORE["unet_controlnet"].build(),
          diffusers.models.MultiControlNetModel), _both("unet_controlnet"), {}, 2, True),
]  # fmt: skip
