#!/usr/bin/env bash
# One picture or video of a family of models on several devices, with the variables of xDiT's examples/run.sh.
# Each may be set in the environment: MODEL_TYPE=Wan N_GPUS=4 PARALLEL_ARGS="--ulysses_degree 4" examples/run.sh
set -eu

MODEL_TYPE=${MODEL_TYPE:-Flux}
declare -A MODEL_CONFIGS=(
    [Flux]="black-forest-labs/FLUX.1-dev 28"
    [Sd3]="stabilityai/stable-diffusion-3-medium-diffusers 28"
    [Pixart-alpha]="PixArt-alpha/PixArt-XL-2-1024-MS 20"
    [Pixart-sigma]="PixArt-alpha/PixArt-Sigma-XL-2-2K-MS 20"
    [HunyuanDiT]="Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers 50"
    [SDXL]="stabilityai/stable-diffusion-xl-base-1.0 30"
    [CogVideoX]="THUDM/CogVideoX-5b 50"
    [Latte]="maxin-cn/Latte-1 50"
    [Mochi]="genmo/mochi-1-preview 64"
    [Wan]="Wan-AI/Wan2.1-T2V-14B-Diffusers 50"
)
if [[ -z ${MODEL_CONFIGS[$MODEL_TYPE]:-} ]]; then
    echo "run.sh: MODEL_TYPE=$MODEL_TYPE is unknown; choose one of ${!MODEL_CONFIGS[*]}" >&2
    exit 2
fi
read -r DEFAULT_ID DEFAULT_STEPS <<< "${MODEL_CONFIGS[$MODEL_TYPE]}"
case $MODEL_TYPE in
    CogVideoX | Mochi | Wan | Latte) SUFFIX=mp4 ;;
    *) SUFFIX=png ;;
esac

MODEL_ID=${MODEL_ID:-$DEFAULT_ID}                                   # a folder will do as well
INFERENCE_STEP=${INFERENCE_STEP:-$DEFAULT_STEPS}
N_GPUS=${N_GPUS:-2}
PARALLEL_ARGS=${PARALLEL_ARGS:---ulysses_degree $N_GPUS}
TASK_ARGS=${TASK_ARGS:-}                                            # --height 1024 --width 1024 --num_frames 49
PIPEFUSION_ARGS=${PIPEFUSION_ARGS:-}                                # --num_pipeline_patch 8 --warmup_steps 1
CFG_ARGS=${CFG_ARGS:-}                                              # --use_cfg_parallel, which halves the other degrees
PARALLLEL_VAE=${PARALLLEL_VAE:-}                                    # --use_parallel_vae (spelt as xDiT spells it)
COMPILE_FLAG=${COMPILE_FLAG:-}                                      # --use_torch_compile; --backend eager compiles nothing
OUTPUT_ARGS=${OUTPUT_ARGS:---output results/$MODEL_TYPE.$SUFFIX --overwrite}
PROMPT=${PROMPT:-brown dog laying on the ground with a metal bowl in front of him.}

mkdir -p results
# shellcheck disable=SC2086 -- these hold several words each
exec torchrun --nproc_per_node="$N_GPUS" --no-python xdit-compile generate --model "$MODEL_ID" $PARALLEL_ARGS $TASK_ARGS \
    $PIPEFUSION_ARGS $OUTPUT_ARGS --num_inference_steps "$INFERENCE_STEP" --prompt "$PROMPT" $CFG_ARGS $PARALLLEL_VAE $COMPILE_FLAG
