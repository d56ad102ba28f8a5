# Stable Diffusion 3: torchrun --nproc_per_node 2 examples/sd3.py
import os
from pathlib import Path

import torch
from diffusers import AutoModel
from diffusers import StableDiffusion3Pipeline as Pipeline
from diffusers.utils import export_to_video, logging

from xdit_compile import Plan, is_main_process, local_device, parallelize

MODEL = "stabilityai/stable-diffusion-3-medium-diffusers"
PARTS = {}
ARGUMENTS = {
    "prompt": "a lighthouse at dusk, waves against the rocks",
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 28,
    "guidance_scale": 7.0,
}

if not is_main_process():
    logging.disable_progress_bar()
device = local_device()
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
parts = {name: AutoModel.from_pretrained(each, torch_dtype=dtype) for name, each in PARTS.items()}
pipe = Pipeline.from_pretrained(MODEL, torch_dtype=dtype, **parts).to(device)
pipe = parallelize(pipe, Plan(ulysses=int(os.environ.get("WORLD_SIZE", 1))))
pipe.set_progress_bar_config(disable=not is_main_process())
result = pipe(**ARGUMENTS, generator=torch.Generator().manual_seed(42))
if is_main_process():
    if hasattr(result, "frames"):
        export_to_video(result.frames[0], f"{Path(__file__).stem}.mp4", fps=16)
    else:
        result.images[0].save(f"{Path(__file__).stem}.png")
