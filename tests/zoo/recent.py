"""Recent and unusual image denoisers, tiny: routed experts, token gathers, layer-wise text, packed sequences."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from zoo.call import DIM, HEADS, LATENT, POOLED, PROMPT, TEXT, case, fixed, mask, normal, rows, step, time
from zoo.transformers import Draw, image_ids

BOOL = torch.bool


def _flux3() -> nn.Module:
    return diffusers.Flux3Transformer2DModel(
        in_channels=12, cond_in_channels=12, num_layers=2, num_single_layers=3, attention_head_dim=20,
        num_attention_heads=HEADS, joint_attention_dim=DIM, timestep_channels=22, axes_dims_rope=(4, 6, 6, 4),
    )  # fmt: skip


def _glm() -> nn.Module:
    return diffusers.GlmImageTransformer2DModel(
        in_channels=6, out_channels=6, num_layers=3, attention_head_dim=16, num_attention_heads=HEADS,
        text_embed_dim=DIM, time_embed_dim=24, condition_dim=8, prior_vq_quantizer_codebook_size=50,
    )  # fmt: skip


def _ernie() -> nn.Module:
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=80, num_attention_heads=HEADS, num_layers=3, ffn_hidden_size=94, in_channels=6, out_channels=6,
        text_in_dim=DIM, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip


def _krea2() -> nn.Module:
    return diffusers.Krea2Transformer2DModel(
        in_channels=12, num_layers=3, attention_head_dim=16, num_attention_heads=15, num_key_value_heads=5,
        intermediate_size=94, timestep_embed_dim=22, text_hidden_dim=30, num_text_layers=3, text_num_attention_heads=5,
        text_num_key_value_heads=5, text_intermediate_size=46, num_layerwise_text_blocks=1, num_refiner_text_blocks=2,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _qwenimage21() -> nn.Module:
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=12, out_channels=12, num_layers=3, attention_head_dim=18, num_attention_heads=HEADS,
        context_in_dim=DIM, axes_dims_rope=(4, 6, 8),
    )  # fmt: skip


def _bria_fibo2() -> nn.Module:
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=6, dim=80, n_layers=3, n_refiner_layers=2, n_heads=HEADS, cap_feat_dim=DIM,
        injection_layer_ids=(1,),
        min_num_gist_tokens=7, max_num_gist_tokens=13, gist_step=3, gist_min_text_len=5, gist_max_text_len=20,
        axes_dims=(4, 4, 8), axes_lens=(64, 24, 24),
    )  # fmt: skip


def _hunyuanimage() -> nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=6, out_channels=6, num_attention_heads=HEADS, attention_head_dim=16, num_layers=2,
        num_single_layers=3, text_embed_dim=DIM, text_embed_2_dim=26, rope_axes_dim=(8, 8),
    )  # fmt: skip


def _nucleus(**config: Any) -> nn.Module:
    return diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=24, out_channels=6, num_layers=3, attention_head_dim=18, num_attention_heads=10,
        num_key_value_heads=5, joint_attention_dim=DIM, axes_dims_rope=(4, 6, 8), num_experts=4,
        moe_intermediate_dim=46,
        capacity_factors=2.0, dense_moe_strategy="leave_first_block_dense", **config,
    )  # fmt: skip


def _ideogram() -> nn.Module:
    return diffusers.Ideogram4Transformer2DModel(
        in_channels=12, num_layers=3, attention_head_dim=16, num_attention_heads=HEADS, intermediate_size=94,
        adaln_dim=22, llm_features_dim=DIM, mrope_section=(4, 2, 2),
    )  # fmt: skip


def _minimax_h3() -> nn.Module:
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=24, hidden_size=70, num_layers=3, ffn_dim=94, in_channels=6,
        audio_in_channels=10, text_dim=DIM, freq_dim=22, time_embed_hidden_dim=40, time_embed_dim=30, rope_freq_dim=4,
    )  # fmt: skip


def _kandinsky6() -> nn.Module:
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=6, out_visual_dim=6, in_text_dim=DIM, in_text_dim2=POOLED, time_dim=24, model_dim=80, ff_dim=94,
        num_text_blocks=2, num_visual_blocks=3, axes_dims=(4, 4, 8), in_audio_dim=10, out_audio_dim=10,
        visual_cond=False, axes_dims_a=(4, 4, 8),
    )  # fmt: skip


def _wan_animate() -> nn.Module:
    return diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=4, attention_head_dim=14, in_channels=16, latent_channels=6, out_channels=6, text_dim=DIM,
        freq_dim=22, ffn_dim=94, num_layers=4, image_dim=26, added_kv_proj_dim=56, rope_max_seq_len=33,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2, motion_encoder_batch_size=3,
    )  # fmt: skip


def _transformer_2d() -> nn.Module:
    return diffusers.Transformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=8, in_channels=20, num_layers=2, norm_num_groups=4,
        cross_attention_dim=DIM, use_linear_projection=True,
    )  # fmt: skip


def _uvit() -> nn.Module:
    return diffusers.UVit2DModel(
        hidden_size=60, cond_embed_dim=POOLED, micro_cond_encode_dim=6, micro_cond_embed_dim=30,
        encoder_hidden_size=DIM,
        vocab_size=40, codebook_size=32, in_channels=20, block_out_channels=20, num_res_blocks=2, block_num_heads=5,
        num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=94, sample_size=8,
    )  # fmt: skip


def four_axes(*sizes: int) -> Tensor:
    """Coordinates of a grid on four axes, (tokens, 4) float."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float()


def packed(d: Draw, lengths: tuple[int, ...], kind: str) -> Tensor:
    """Positions, segments or token kinds of ``[left padding | text | image]`` rows over 7 x 11 image tokens."""
    rows_: dict[str, list[Tensor]] = {"positions": [], "segments": [], "kinds": []}
    for length in lengths:
        pad = TEXT - length
        text = torch.arange(length)[:, None].expand(-1, 3)
        image = image_ids(7, 11).long() + 64
        rows_["positions"].append(torch.cat([torch.zeros(pad, 3, dtype=torch.int64), text, image]))
        rows_["segments"].append(torch.tensor([-1] * pad + [1] * (length + 77)))
        rows_["kinds"].append(torch.tensor([0] * pad + [3] * length + [2] * 77))
    return d.put(torch.stack(rows_[kind]))


def codes(*shape: int, below: int) -> Any:
    """Random indices, (batch, *shape) int64."""
    return lambda d, b: d.put(torch.randint(below, (b, *shape), generator=d.generator))


def omnigen_mask(d: Draw, b: int) -> Tensor:
    """(batch, tokens, tokens) of 0 and 1: text is causal, the image sees all; sample 0 is padded on the left."""
    total = TEXT + 1 + 77
    mask = torch.tril(torch.ones(total, total, dtype=torch.int64)).expand(b, -1, -1).clone()
    mask[:, TEXT:] = 1
    mask[0, :, :4] = 0
    mask[0, :4, 0] = 1
    return d.put(mask)


def _omnigen() -> nn.Module:
    return diffusers.OmniGenTransformer2DModel(
        in_channels=6, hidden_size=80, num_attention_heads=HEADS, num_key_value_heads=HEADS, intermediate_size=94,
        num_layers=3, pad_token_id=0, vocab_size=50, time_step_dim=24, pos_embed_max_size=15,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.1] * 8},
    )  # fmt: skip


H3_TEXT, H3_VIDEO, H3_AUDIO = 13, 175, 17
H3_TOTAL = H3_TEXT + H3_VIDEO + H3_AUDIO

RECENT = [
    case(
        "flux3", _flux3, 1, hidden_states=normal(77, 12), encoder_hidden_states=PROMPT, timestep=time(0.7),
        img_ids=fixed(lambda: four_axes(1, 7, 11, 1)), txt_ids=fixed(lambda: four_axes(1, 1, 1, TEXT)),
        image_cond_hidden_states=normal(35, 12), image_cond_ids=fixed(lambda: four_axes(1, 5, 7, 1) + 1),
    ),
    case(
        "glm_image", _glm, 1, hidden_states=LATENT, encoder_hidden_states=PROMPT, prior_token_id=codes(77, below=50),
        prior_token_drop=lambda d, b: d.put(torch.zeros(b, 77, dtype=BOOL)), timestep=step(),
        target_size=rows(112, 176), crop_coords=rows(0, 0), attention_kwargs=None,
    ),
    case(
        "ernie_image", _ernie, lengths=[("text_bth", (9, 13))], hidden_states=normal(6, 7, 11), timestep=time(701.0),
        text_bth=PROMPT,
        text_lens=lambda d, b: d.put(torch.tensor([9, 13] * b)[:b]),
    ),
    case(
        "krea2", _krea2, 1, hidden_states=normal(77, 12), encoder_hidden_states=normal(TEXT, 3, 30), timestep=time(0.7),
        position_ids=fixed(lambda: torch.cat([torch.zeros(TEXT, 3), image_ids(7, 11)])),
        encoder_attention_mask=mask(9, dtype=BOOL), attention_kwargs=None,
    ),
    case(
        "qwenimage21", _qwenimage21, 1, reach=0.8,
        idle=[("img_mask", "a layout that the sizes must match")],
        hidden_states=normal(80, 12), encoder_hidden_states=PROMPT, timestep=time(0.7),
        img_shapes=[[(1, 8, 10)]], img_mask=lambda d, b: d.put(torch.arange(TEXT + 20).expand(b, -1) >= TEXT),
        encoder_hidden_states_mask=mask(9), attention_kwargs={},
    ),
    case(
        "bria_fibo2", _bria_fibo2, hidden_states=LATENT, timestep=time(0.7), encoder_hidden_states=normal(2, TEXT, DIM),
        encoder_attention_mask=mask(7, 13, dtype=BOOL), context_latents=None,
    ),
    case(
        "hunyuanimage", _hunyuanimage, hidden_states=normal(6, 7, 11), timestep=time(701.0),
        encoder_hidden_states=PROMPT,
        encoder_attention_mask=mask(7, 13), encoder_hidden_states_2=normal(11, 26),
        encoder_attention_mask_2=mask(5, 11, total=11), attention_kwargs=None,
    ),
    case(
        "nucleus_moe", _nucleus, 1, hidden_states=normal(77, 24), img_shapes=[(1, 7, 11)], encoder_hidden_states=PROMPT,
        encoder_hidden_states_mask=mask(9, dtype=BOOL), timestep=time(0.7), attention_kwargs=None,
    ),
    case(
        "ideogram4", _ideogram,
        idle=[("segment_ids", "only equality counts"), ("hidden_states",
        "packed: each stream is zeroed where the other stands")],
        hidden_states=normal(TEXT + 77, 12), timestep=time(0.7),
        encoder_hidden_states=normal(TEXT + 77, DIM),
        position_ids=lambda d, b: packed(d, (7, 13)[:b], "positions"),
        segment_ids=lambda d, b: packed(d, (7, 13)[:b], "segments"),
        indicator=lambda d, b: packed(d, (7, 13)[:b], "kinds"),
    ),
    case(
        "minimax_h3", _minimax_h3, 1, hidden_states=normal(H3_VIDEO, 24), audio_hidden_states=normal(H3_AUDIO, 10),
        encoder_hidden_states=PROMPT, timestep=fixed(lambda: torch.tensor([0.0, 701.0])),
        timestep_indices=fixed(lambda: torch.tensor([0] * H3_TEXT + [1] * (H3_VIDEO + H3_AUDIO))),
        token_tags=fixed(lambda: torch.tensor([0] * H3_TEXT + [1] * H3_VIDEO + [2] * H3_AUDIO)),
        position_ids=fixed(lambda: torch.cartesian_prod(torch.arange(5), torch.arange(41), torch.arange(1)).float()),
        text_indices=fixed(lambda: torch.arange(H3_TEXT)),
        video_indices=fixed(lambda: torch.arange(H3_TEXT, H3_TEXT + H3_VIDEO)),
        audio_indices=fixed(lambda: torch.arange(H3_TEXT + H3_VIDEO, H3_TOTAL)), attention_kwargs=None,
    ),
    case(
        "kandinsky6", _kandinsky6, 1, hidden_states=normal(5, 10, 14, 6), encoder_hidden_states=PROMPT,
        pooled_projections=normal(POOLED), timestep=time(701.0), audio_hidden_states=normal(17, 10),
        visual_rope_pos=lambda d, b: tuple(d.put(torch.arange(n)) for n in (5, 5, 7)),
    ),
    case(
        "wan_animate", _wan_animate, 1, idle=[("face_pixel_values",
        "reaches the output through a narrow motion vector, at 1e-5")],
        hidden_states=normal(16, 5, 10, 14), timestep=step(),
        encoder_hidden_states=normal(512, DIM), encoder_hidden_states_image=normal(9, 26),
        pose_hidden_states=normal(6, 4, 10, 14), face_pixel_values=normal(3, 13, 16, 16), attention_kwargs=None,
    ),
    case(
        "transformer_2d", _transformer_2d, hidden_states=normal(20, 7, 11), encoder_hidden_states=PROMPT,
        encoder_attention_mask=mask(7, 13),
    ),
    case(
        "uvit", _uvit, input_ids=codes(8, 8, below=40), encoder_hidden_states=PROMPT, pooled_text_emb=normal(POOLED),
        micro_conds=rows(512, 512, 0, 0, 6), return_dict=None,
    ),
    case(
        "omnigen", _omnigen, hidden_states=LATENT, timestep=time(0.3), input_ids=codes(TEXT, below=50),
        input_img_latents=lambda d, b: [], input_image_sizes={}, attention_mask=omnigen_mask,
        position_ids=lambda d, b: d.put(torch.arange(TEXT + 78).expand(b, -1)),
    ),
    case(
        "t5film", lambda: diffusers.models.T5FilmDecoder(
            input_dims=10, targets_length=83, d_model=60, num_layers=3, num_heads=HEADS, d_kv=12, d_ff=94,
        ),
        lengths=[("encodings_and_masks", (7, 13))],
        encodings_and_masks=lambda d, b: [(d.normal(b, TEXT, 60), d.mask([7, 13][:b], TEXT, torch.float32))],
        decoder_input_tokens=normal(83, 10), decoder_noise_time=time(0.7), return_dict=None,
    ),
]  # fmt: skip
