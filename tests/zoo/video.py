"""Video and audio denoisers, tiny, with the inputs their pipelines pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_3d_rotary_pos_embed,
    get_3d_rotary_pos_embed_allegro,
)
from torch import Tensor, nn
from zoo.call import CLIP, DIM, HEADS, POOLED, PROMPT, TEXT, case, fixed, mask, normal, step, time
from zoo.transformers import Draw

WAN: dict[str, Any] = {
    "num_attention_heads": HEADS, "attention_head_dim": 14, "in_channels": 6, "out_channels": 6, "text_dim": DIM,
    "freq_dim": 22, "ffn_dim": 94, "num_layers": 3, "rope_max_seq_len": 33,
}  # fmt: skip


def _ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=12, out_channels=12, num_attention_heads=HEADS, attention_head_dim=12, cross_attention_dim=60,
        num_layers=3, caption_channels=DIM,
    )  # fmt: skip


def _allegro() -> nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=12, in_channels=6, out_channels=6, num_layers=3,
        cross_attention_dim=60, sample_height=10, sample_width=14, sample_frames=5, caption_channels=DIM,
    )  # fmt: skip


def _allegro_rotary() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    made = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (5, 7)), (5, 7), 5, interpolation_scale=(2.2, 2.0, 2.0))
    grids = torch.cartesian_prod(*(grid.long() for grid in made[3:])).T.reshape(3, 1, -1).contiguous()
    return made[:3], tuple(grids)


def _hunyuan_video(**config: Any) -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=6, out_channels=6, num_attention_heads=HEADS, attention_head_dim=16, num_layers=2,
        num_single_layers=3, text_embed_dim=DIM, pooled_projection_dim=POOLED, rope_axes_dim=(4, 4, 8), **config,
    )  # fmt: skip


def _hunyuan_video15() -> nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=13, out_channels=6, num_attention_heads=HEADS, attention_head_dim=16, num_layers=3,
        text_embed_dim=DIM, text_embed_2_dim=26, image_embed_dim=24, rope_axes_dim=(4, 4, 8), target_size=16,
    )  # fmt: skip


def _framepack() -> nn.Module:
    return diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=6, out_channels=6, num_attention_heads=HEADS, attention_head_dim=16, num_layers=2,
        num_single_layers=2, text_embed_dim=DIM, pooled_projection_dim=POOLED, rope_axes_dim=(4, 4, 8),
        has_image_proj=True, image_proj_dim=24, has_clean_x_embedder=True,
    )  # fmt: skip


def _easyanimate() -> nn.Module:
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=16, in_channels=6, out_channels=6, patch_size=2, num_layers=3,
        mmdit_layers=2, sample_width=14, sample_height=10, time_embed_dim=22, text_embed_dim=DIM,
    )  # fmt: skip


def _cosmos() -> nn.Module:  # its padding mask is resized by torchvision, which is not required here
    return diffusers.CosmosTransformer3DModel(
        in_channels=6, out_channels=6, num_attention_heads=HEADS, attention_head_dim=16, num_layers=3,
        text_embed_dim=DIM, adaln_lora_dim=10, max_size=(8, 12, 16), concat_padding_mask=False,
    )  # fmt: skip


def _kandinsky5() -> nn.Module:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=6, in_text_dim=DIM, in_text_dim2=POOLED, time_dim=24, out_visual_dim=6, model_dim=80, ff_dim=94,
        num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 4, 8),
    )  # fmt: skip


def _consisid() -> nn.Module:
    return diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=16, in_channels=6, out_channels=6, time_embed_dim=22,
        text_embed_dim=DIM, num_layers=4, sample_width=14, sample_height=10, sample_frames=17, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=10,
        cross_attn_num_heads=3, LFE_id_dim=26, LFE_vit_dim=24, LFE_depth=4, LFE_dim_head=8, LFE_num_heads=3,
        LFE_num_id_token=3, LFE_num_querie=7, LFE_output_dim=53, LFE_ff_mult=2, LFE_num_scale=2,
    )  # fmt: skip


def _sana_video() -> nn.Module:
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=6, out_channels=6, num_attention_heads=HEADS, attention_head_dim=12, num_layers=3,
        num_cross_attention_heads=3, cross_attention_head_dim=20, cross_attention_dim=60, caption_channels=DIM,
        sample_size=7, rope_max_seq_len=32,
    )  # fmt: skip


def _motif() -> nn.Module:
    return diffusers.MotifVideoTransformer3DModel(
        in_channels=6, out_channels=6, num_attention_heads=HEADS, attention_head_dim=16, num_layers=2,
        num_single_layers=3, num_decoder_layers=1, text_embed_dim=DIM, enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip


def _anyflow() -> nn.Module:
    config = {key: value for key, value in WAN.items() if key != "attention_head_dim"}
    return diffusers.AnyFlowTransformer3DModel(attention_head_dim=14, **config)


def _helios() -> nn.Module:
    config = {key: value for key, value in WAN.items() if key not in ("attention_head_dim", "rope_max_seq_len")}
    return diffusers.HeliosTransformer3DModel(attention_head_dim=16, rope_dim=(4, 6, 6), **config)


def _ltx2() -> nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=12, out_channels=12, num_attention_heads=HEADS, attention_head_dim=12, cross_attention_dim=60,
        audio_in_channels=10, audio_out_channels=10, audio_num_attention_heads=HEADS, audio_attention_head_dim=6,
        audio_cross_attention_dim=30, num_layers=3, caption_channels=DIM,
    )  # fmt: skip


def _joyimage() -> nn.Module:
    return diffusers.JoyImageEditTransformer3DModel(
        in_channels=6, hidden_size=80, num_attention_heads=HEADS, text_dim=DIM, num_layers=3, rope_dim_list=[4, 4, 8],
    )  # fmt: skip


def _stable_audio() -> nn.Module:
    return diffusers.StableAudioDiTModel(
        sample_size=83, in_channels=6, num_layers=3, attention_head_dim=16, num_attention_heads=10,
        num_key_value_attention_heads=5, out_channels=6, cross_attention_dim=80, time_proj_dim=22,
        global_states_input_dim=26, cross_attention_input_dim=DIM,
    )  # fmt: skip


def _stable_audio3() -> nn.Module:
    return diffusers.StableAudio3DiTModel(
        io_channels=6, embed_dim=160, depth=3, num_heads=HEADS, cond_token_dim=DIM, global_cond_dim=26,
        local_add_cond_dim=7, timestep_features_dim=22, num_memory_tokens=3,
    )  # fmt: skip


def _longcat_audio() -> nn.Module:
    return diffusers.LongCatAudioDiTTransformer(
        dit_dim=80, dit_depth=3, dit_heads=HEADS, dit_text_dim=DIM, latent_dim=6,
    )  # fmt: skip


def _ace_step() -> nn.Module:
    return diffusers.AceStepTransformer1DModel(
        hidden_size=80, intermediate_size=94, num_hidden_layers=4, num_attention_heads=10, num_key_value_heads=5,
        head_dim=16, in_channels=18, audio_acoustic_hidden_dim=6, sliding_window=7, encoder_hidden_size=DIM,
    )  # fmt: skip


def _minimax_music() -> nn.Module:
    return diffusers.MiniMaxMusic3Transformer1DModel(
        in_channels=6, condition_dim=DIM, num_layers=3, num_attention_heads=HEADS, attention_head_dim=16,
        ff_inner_dim=94, rotary_dim=8, fourier_embedding_dim=22,
    )  # fmt: skip


def _temporal() -> nn.Module:
    return diffusers.models.TransformerTemporalModel(
        num_attention_heads=HEADS, attention_head_dim=8, in_channels=20, num_layers=2, norm_num_groups=4,
        cross_attention_dim=None, positional_embeddings="sinusoidal", num_positional_embeddings=9,
    )  # fmt: skip


def frames(*numbers: int) -> Callable[[Draw, int], Tensor]:
    """Frame numbers, (batch, frames) int64."""
    return lambda d, b: d.put(torch.tensor(numbers).expand(b, -1))


def numbers(*values: int) -> Callable[[Draw, int], Tensor]:
    """Frame numbers shared by the batch, (frames,) int64."""
    return lambda d, b: d.put(torch.tensor(values))


WAN_CALL: dict[str, Any] = {
    "hidden_states": CLIP, "timestep": step(), "encoder_hidden_states": PROMPT, "attention_kwargs": None,
}  # fmt: skip
HUNYUAN_CALL: dict[str, Any] = {
    "hidden_states": CLIP, "timestep": step(), "encoder_hidden_states": PROMPT, "encoder_attention_mask": mask(7, 13),
    "pooled_projections": normal(POOLED), "attention_kwargs": None,
}  # fmt: skip

VIDEOS = [
    case(
        "ltx", _ltx, hidden_states=normal(175, 12), encoder_hidden_states=PROMPT, timestep=step(),
        encoder_attention_mask=mask(7, 13), num_frames=5, height=5, width=7,
        rope_interpolation_scale=(8 / 25, 32, 32), attention_kwargs=None,
    ),
    case(
        "ltx2", _ltx2, idle=[("sigma", "read by later versions of the model only")], hidden_states=normal(175, 12),
        audio_hidden_states=normal(17, 10), encoder_hidden_states=PROMPT,
        audio_encoder_hidden_states=PROMPT, timestep=step(), sigma=step(), encoder_attention_mask=mask(7, 13),
        audio_encoder_attention_mask=mask(7, 13), num_frames=5, height=5, width=7, fps=24.0, audio_num_frames=17,
        attention_kwargs=None,
    ),
    case(
        "allegro", _allegro, hidden_states=CLIP, encoder_hidden_states=PROMPT, encoder_attention_mask=mask(7, 13),
        timestep=step(), image_rotary_emb=lambda d, b: _allegro_rotary(),
    ),
    case("hunyuan_video", _hunyuan_video, 1, guidance=time(6000.0), **{**HUNYUAN_CALL,
    "encoder_attention_mask": mask(9)}),
    case("hunyuan_video_ragged", _hunyuan_video, 2, guidance=time(6000.0), **HUNYUAN_CALL),
    case(
        "hunyuan_video15", _hunyuan_video15, hidden_states=normal(13, 5, 5, 7), timestep=time(701.0),
        encoder_hidden_states=PROMPT, encoder_attention_mask=mask(7, 13), encoder_hidden_states_2=normal(11, 26),
        encoder_attention_mask_2=mask(5, 11, total=11), image_embeds=normal(9, 24), timestep_r=None,
    ),
    case(
        "framepack", _framepack, 1, image_embeds=normal(9, 24), indices_latents=numbers(7, 8, 9, 10, 11),
        guidance=time(6000.0), latents_clean=normal(6, 2, 10, 14), indices_latents_clean=numbers(0, 6),
        latents_history_2x=normal(6, 2, 10, 14), indices_latents_history_2x=numbers(4, 5),
        latents_history_4x=normal(6, 4, 10, 14), indices_latents_history_4x=numbers(0, 1, 2, 3), **HUNYUAN_CALL,
    ),
    case("easyanimate", _easyanimate, hidden_states=CLIP, timestep=step(), encoder_hidden_states=PROMPT),
    case(
        "cosmos", _cosmos, 1, hidden_states=CLIP, timestep=time(0.7), encoder_hidden_states=PROMPT, fps=30,
    ),
    case(
        "kandinsky5", _kandinsky5, 1, hidden_states=normal(5, 10, 14, 6), encoder_hidden_states=PROMPT,
        pooled_projections=normal(POOLED), timestep=time(701.0), text_rope_pos=fixed(lambda: torch.arange(TEXT)),
        visual_rope_pos=lambda d, b: [d.put(torch.arange(n)) for n in (5, 5, 7)], scale_factor=(1.0, 2.0, 2.0),
        sparse_params=None,
    ),
    case(
        "consisid", _consisid, hidden_states=normal(5, 6, 10, 14), encoder_hidden_states=PROMPT, timestep=step(),
        image_rotary_emb=fixed(lambda: get_3d_rotary_pos_embed(16, ((0, 0), (5, 7)), (5, 7), 5)),
        id_cond=normal(26), id_vit_hidden=lambda d, b: [d.normal(b, 9, 24) for _ in range(2)],
    ),
    case(
        "sana_video", _sana_video, hidden_states=CLIP, encoder_hidden_states=PROMPT, timestep=time(701.0),
        encoder_attention_mask=mask(7, 13), attention_kwargs=None,
    ),
    case(
        "motif_video", _motif, hidden_states=CLIP, timestep=time(701.0), encoder_hidden_states=PROMPT,
        encoder_attention_mask=mask(7, 13), attention_kwargs=None,
    ),
    case("skyreels", lambda: diffusers.SkyReelsV2Transformer3DModel(**WAN), 1, **WAN_CALL),
    case(
        "wan_vace", lambda: diffusers.WanVACETransformer3DModel(vace_layers=[0, 2], vace_in_channels=10, **WAN), 1,
        control_hidden_states=normal(10, 5, 10, 14), control_hidden_states_scale=fixed(lambda: torch.tensor([1.0,
        0.7])),
        **WAN_CALL,
    ),
    case("chronoedit", lambda: diffusers.ChronoEditTransformer3DModel(**WAN), 1, **WAN_CALL),
    case(
        "wan_per_token_time", lambda: diffusers.WanTransformer3DModel(**WAN), 1,
        **{**WAN_CALL, "timestep": lambda d, b: d.put(torch.arange(175).expand(b, -1) + 500)},
    ),
    case(
        "anyflow", _anyflow, 1, hidden_states=normal(5, 6, 10, 14), timestep=lambda d, b: d.full(b * 5, 701).view(b, 5),
        r_timestep=lambda d, b: d.full(b * 5, 301).view(b, 5), encoder_hidden_states=PROMPT, attention_kwargs=None,
    ),
    case(
        "helios", _helios, 1, indices_hidden_states=frames(7, 8, 9, 10, 11), indices_latents_history_short=frames(5, 6),
        indices_latents_history_mid=frames(3, 4), indices_latents_history_long=frames(0, 1, 2, 3),
        latents_history_short=normal(6, 2, 10, 14), latents_history_mid=normal(6, 2, 10, 14),
        latents_history_long=normal(6, 4, 10, 14), **WAN_CALL,
    ),
    case("joyimage", _joyimage, hidden_states=CLIP, timestep=time(701.0), encoder_hidden_states=PROMPT),
    case(
        "stable_audio", _stable_audio, hidden_states=normal(6, 83), timestep=fixed(lambda: torch.tensor([0.7])),
        encoder_hidden_states=PROMPT, global_hidden_states=normal(1, 26),
        rotary_embedding=fixed(
            lambda: get_1d_rotary_pos_embed(8, 84, use_real=True, repeat_interleave_real=False)
        ),
    ),
    case(
        "stable_audio3", _stable_audio3, hidden_states=normal(6, 83), timestep=time(0.7), encoder_hidden_states=PROMPT,
        global_hidden_states=normal(26), encoder_attention_mask=mask(7, 13), local_add_cond=normal(7, 83),
    ),
    case(
        "longcat_audio", _longcat_audio, reach=0.8, hidden_states=normal(83, 6), encoder_hidden_states=PROMPT,
        encoder_attention_mask=mask(7, 13), timestep=time(0.7), latent_cond=normal(83, 6),
        attention_mask=mask(71, 83, total=83, dtype=torch.bool),
    ),
    case(
        "ace_step", _ace_step, hidden_states=normal(83, 6), timestep=time(0.7), timestep_r=time(0.6),
        encoder_hidden_states=PROMPT, context_latents=normal(83, 12),
    ),
    case(
        "minimax_music", _minimax_music, hidden_states=normal(6, 83), timestep=time(0.7),
        encoder_hidden_states=normal(83, DIM),
    ),
    case("temporal", _temporal, 10, hidden_states=normal(20, 7, 11), num_frames=5),
]  # fmt: skip
