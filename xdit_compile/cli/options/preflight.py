"""What this machine and its packages cannot do for a request, told before PyTorch is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from collections.abc import Iterator

from xdit_compile.cache.folder import AUTO, resolve
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan import nexfort_versions
from xdit_compile.plan.backend_options import GRAPHS
from xdit_compile.plan.host import may_have_cuda, visible_cards
from xdit_compile.plan.packages import ATTENTION_PACKAGES, version_of
from xdit_compile.plan.plan import GRAPH_MODES, Plan

from .plenty import cpu_build, uses_cuda
from .request import PipelineRequest

COMPILERS = ("c++", "g++", "clang++")
ON_CUDA = (*ATTENTION_PACKAGES, "sdpa_efficient", "sdpa_cudnn")
"""Providers without a kernel for the CPU."""


def preflight(request: PipelineRequest, world: World, nproc: int | None) -> None:
    """Refuse what is plainly not here. What cannot be told from files alone is refused later.

    Raises:
        UsageError: naming every problem at once, and the way out of each.
    """
    problems = [*_device(request, world, nproc), *_packages(request), *_cache_folder(request.plan)]
    if problems:
        raise UsageError("; ".join(problems))


def check_cache_folder(plan: Plan) -> None:
    """Refuse a cache folder that somebody named and that is none.

    Raises:
        UsageError: a file is in its place.
    """
    for problem in _cache_folder(plan):
        raise UsageError(problem)


def _device(request: PipelineRequest, world: World, nproc: int | None) -> Iterator[str]:
    if request.device == "cuda" and (cpu_build() or not may_have_cuda()):
        version = version_of("torch")
        why = f"the installed PyTorch ({version}) is built for the CPU" if cpu_build() else "this machine has no GPU"
        yield f"--device cuda: {why}; give --device cpu or auto"
    offloads = request.enable_model_cpu_offload or request.enable_sequential_cpu_offload
    if offloads and request.device == "cpu":
        yield "offloading to the CPU needs a CUDA device to offload from; leave it out"
    cards = visible_cards() if uses_cuda(request) else None
    if cards is not None and nproc is not None and nproc > cards:
        gpus = "1 GPU is" if cards == 1 else f"{cards} GPUs are"
        yield f"--nproc {nproc} but {gpus} visible here; start at most {cards}, or compute on the CPU (--device cpu)"


def _packages(request: PipelineRequest) -> Iterator[str]:
    plan = request.plan
    if plan.backend == "nexfort":
        if (reason := nexfort_versions.why_not()) is not None:
            yield f"--backend nexfort cannot be used here: {reason}"
    if plan.records_graphs and plan.compile_mode != "max-autotune" and not uses_cuda(request):
        asked = f"--compile_mode {plan.compile_mode}" if plan.compile_mode in GRAPH_MODES else GRAPHS
        yield f"{asked} records CUDA graphs, and this computes on the CPU; leave it out"
    if plan.backend == "inductor" and not uses_cuda(request) and not any(map(shutil.which, COMPILERS)):
        yield "--backend inductor needs a C++ compiler on the CPU; install g++, or take --backend eager"
    if plan.attention in ATTENTION_PACKAGES:
        module, command = ATTENTION_PACKAGES[plan.attention]
        module = module.partition(".")[0]
        if importlib.util.find_spec(module) is None:
            yield f"--attention {plan.attention} is not installed ({module}); run: {command}, or take --attention auto"
    elif plan.attention in ON_CUDA and (request.device == "cpu" or cpu_build()):
        yield f"--attention {plan.attention} runs on CUDA, not on the CPU; take --attention auto"
    if plan.vae == "distvae" and importlib.util.find_spec("distvae") is None:
        yield "--vae_provider distvae needs the package: pip install distvae; or leave it out"


def _cache_folder(plan: Plan) -> Iterator[str]:
    folder = None if plan.cache == AUTO else resolve(plan.cache)
    if folder is not None:
        nearest = next(each for each in (folder, *folder.parents) if each.exists())
        if not nearest.is_dir():
            yield f"--cache_dir {plan.cache}: {nearest} is no folder; name another one"
