"""The flags of xDiT 0.7.0: what some of them are here, and why others are refused.

All that stand in neither table are ours, too, by the same name.
"""

from __future__ import annotations

from typing import Any

from xdit_compile.errors import UsageError
from xdit_compile.plan.methods import METHODS

XDIT_ATTENTIONS = {
    "cudnn": "sdpa_cudnn",
    "flash": "flash_attn",
    "flash_3": "flash_attn_3",
    "flash_4": "flash_attn_4",
}
"""How xDiT calls attention providers, and our names; the others have the same."""
SWITCHES = {
    "use_torch_compile": ("backend", "inductor"),
    "use_onediff": ("backend", "nexfort"),
    "use_cuda_graph": ("compile_mode", "reduce-overhead"),
}
"""Flags of xDiT's without a value, and which of ours they stand for with which value."""
_UNSET = {"backend": "auto", "compile_mode": "default"}

SAME: dict[str, str] = {
    "attention_backend": "attention",
    "img_file_path": "image",
    "input_images": "image",
    "use_onediff": "backend",
    "use_torch_compile": "backend",
    "use_cuda_graph": "compile_mode",
    "vae_parallel_size": "vae_parallel_degree",
}
"""What flags of xDiT's are here, by their names and ours."""
_STEP_CACHES = (
    "nothing here caches steps, as a graph computes every one; give fewer of them with --num_inference_steps, or start "
    "one of diffusers' caches in Python, with Plan(fallback='unsplit')"
)
_SPARSE = (
    "attention here is never sparse; --attention names the kernels that there are, and sage is the quick, inexact one"
)
_FAST_ATTENTION = "nothing here compresses attention by a calibration; --attention sage is the quick, inexact one"
_SCHEDULED_ATTENTION = "one attention kernel computes all steps; name it with --attention"
_QUANTIZED = (
    "nothing here quantizes products; --dtype bfloat16 is the smallest, and --tensor_parallel_degree shares the weights"
)
_SHARDED = (
    "no weights are gathered layer by layer; --tensor_parallel_degree shares them among ranks, "
    "--pipefusion_parallel_degree gives each rank some of the blocks, and --enable_model_cpu_offload keeps models on "
    "the CPU while they do not run"
)
_LOADING = (
    "nothing is to be asked for: with --tensor_parallel_degree each rank reads its own slices of the weights, and "
    "without it every rank holds all of them"
)
_TILES = "tiles have the size that the autoencoder chooses; give --enable_tiling, or bound its memory with --vae_memory"
_TRACED = "one step is traced, once everything is compiled; give --profile FILE"
_GROUPS = "groups of layers are not moved, as a graph takes all weights at once; give --enable_model_cpu_offload"
_DATASET = (
    "prompts are given with --prompt, again for each, or for a comparison with evaluate --prompts FILE, one a line"
)
_REASONS: dict[str, str] = {
    "cache_config cache_method use_fbcache use_teacache": _STEP_CACHES,
    "coco_path n_calib threshold use_cache use_fast_attn window_size": _FAST_ATTENTION,
    "hybrid_attn_high_precision_backend hybrid_attn_low_precision_backend hybrid_attn_schedule "
    "num_hybrid_attn_high_precision_steps use_hybrid_attn_schedule": _SCHEDULED_ATTENTION,
    "spargeattn_cdfthreshold spargeattn_reorder_sequence spargeattn_simthreshold use_spargeattn_head_balance "
    "use_spargeattn_static_block_mask use_ssta_sparse_text_to_image use_vsa_first_frame_mask use_vsa_static_block_mask "
    "vsa_block_size vsa_collect_density vsa_drop_rates vsa_prob_threshold vsa_reorder_sequence vsa_top_k "
    "vsa_top_k_ratio": _SPARSE,
    "gemm_config gemm_quantization num_hybrid_gemm_high_precision_steps use_hybrid_gemm_schedule": _QUANTIZED,
    "fully_shard_degree no_reshard_after_forward shard_dit": _SHARDED,
    "memory_efficient_replicated_load memory_efficient_sharding": _LOADING,
    "vae_tile_overlap_height vae_tile_overlap_width vae_tile_size_height vae_tile_size_width": _TILES,
    "profile_active profile_capture_phase profile_wait profile_warmup profile_with_stack": _TRACED,
    "use_profiler": "give --profile FILE, which writes a trace of one step",
    "enable_group_cpu_offload group_offload_low_cpu_mem": _GROUPS,
    "dataset_path": _DATASET,
    "cross_attention_backend": "one kernel computes all attention of a denoiser; name it with --attention",
    "determinism_check_report_ranks": "give --determinism_check: it names the ranks whose pictures differ",
    "distilled_transformer_path": "put the weights into a pipeline folder, and give it with --model",
    "flow_shift": "set flow_shift, or shift, in scheduler/scheduler_config.json of the folder of --model",
    "ray_world_size use_ray": "processes are started here with --nproc, or on several hosts by torchrun or srun",
    "task": "a pipeline has one task here; name another one with --model, and give pictures with --image",
    "text_encoder_tp_degree": "text encoders run whole on every rank; --enable_model_cpu_offload moves them away after "
    "the prompt",
    "use_vae_channels_last_format": "nothing here does that; --use_parallel_vae splits the autoencoder and compiles it",
}
REFUSED: dict[str, str] = {name: why for names, why in _REASONS.items() for name in names.split()}
"""Why a flag of xDiT's is refused, and what does the same, or that nothing does."""


def in_our_words(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags of a plan with ours in place of those that xDiT has besides.

    Raises:
        UsageError: two of them say different things, or the ranks of the denoiser are not the product of the degrees.
    """
    flags = dict(flags)
    for name, (ours, value) in SWITCHES.items():
        if flags.pop(name):
            if flags[ours] not in (_UNSET[ours], value):
                raise UsageError(
                    f"--{name} is --{ours} {value}, and --{ours} {flags[ours]} is asked for; leave one out"
                )
            flags[ours] = value
    size, product = flags.pop("dit_parallel_size"), 1
    for method in METHODS:
        product *= flags[method.flag] if method.flag_degree is None else method.flag_degree if flags[method.flag] else 1
    if size not in (0, product) and product > 1:
        raise UsageError(f"--dit_parallel_size {size}: the degrees make {product} ranks; change one, or leave it out")
    flags["vae_parallel_degree"] = flags["vae_parallel_degree"] or None
    return flags
