"""What every command does with a pipeline: load it, find out what its call takes, call it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xdit_compile.cli.inputs.asked import PICTURES
from xdit_compile.cli.options.request import DTYPES, PipelineRequest, find_model
from xdit_compile.cli.processes.speech import OURS, loading, set_logs
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError, one_line

if TYPE_CHECKING:
    import torch

_PASSED_ON = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "max_sequence_length",
    "num_images_per_prompt",
)
_GENERATOR = "generator"
_BINNING = "use_resolution_binning"
_OTHER_SPELLINGS = {"num_frames": "video_length", "input_images": "image", "control_image": "image"}


def placement(request: PipelineRequest, world: World) -> tuple[torch.device, torch.dtype]:
    """This rank's device, which is made current, and the weights' dtype.

    Raises:
        UsageError: CUDA is asked for and there is none for this rank, or there is nothing to offload from.
    """
    import torch

    from xdit_compile.distributed.devices import accelerator, local_device

    kind = accelerator()
    if request.device == "cuda" and (kind is None or kind.type != "cuda"):
        raise UsageError(f"--device cuda: rank {world.rank} has no CUDA device; give --device cpu or auto")
    if request.device == "cpu" or kind is None:
        if request.enable_model_cpu_offload or request.enable_sequential_cpu_offload:
            raise UsageError("offloading to the CPU needs a CUDA device to offload from; leave it out")
        return torch.device("cpu"), weights_dtype(request)
    return local_device(world), weights_dtype(request)


def weights_dtype(request: PipelineRequest) -> torch.dtype:
    """The dtype of the weights: where none is asked for, bfloat16 on an accelerator."""
    import torch

    from xdit_compile.distributed.devices import accelerator

    fast = request.device != "cpu" and accelerator() is not None
    return getattr(torch, DTYPES.get(request.dtype) or ("bfloat16" if fast else "float32"))


def load_pipeline(request: PipelineRequest, device: torch.device, dtype: torch.dtype) -> Any:
    """The unmodified diffusers pipeline on its device.

    Raises:
        XditCompileError: it cannot be loaded, with the reason in one line.
    """
    from diffusers import DiffusionPipeline

    name = find_model(request.model)
    try:
        pipe = DiffusionPipeline.from_pretrained(name, dtype=dtype, **_hub(request))
        if request.enable_model_cpu_offload:
            pipe.enable_model_cpu_offload(device=device)
        elif request.enable_sequential_cpu_offload:
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
    except Exception as error:
        raise XditCompileError(f"--model {name} cannot be loaded: {one_line(error)}") from error
    return _saving_memory(pipe, request)


def _saving_memory(pipe: Any, request: PipelineRequest) -> Any:
    """A pipeline whose autoencoder works in the pieces that were asked for, where it can."""
    for name in ("enable_slicing", "enable_tiling"):
        if getattr(request, name):
            switches = [getattr(part, name) for part in pipe.components.values() if hasattr(part, name)]
            for switch in switches:
                switch()
            if not switches:
                warn(World.from_environment(), f"--{name}: no model of this pipeline has that")
    return pipe


def _hub(request: PipelineRequest) -> dict[str, Any]:
    """Arguments that say how a model is fetched."""
    found: dict[str, Any] = {"trust_remote_code": True} if request.trust_remote_code else {}
    return found if request.download_dir is None else {**found, "cache_dir": request.download_dir}


def open_pipeline(request: PipelineRequest, world: World) -> tuple[Any, torch.device]:
    """The pipeline of a request on this rank's device, and the device.

    Raises:
        XditCompileError: it cannot be loaded, or there is no such device.
    """
    set_logs(request, world)
    device, dtype = placement(request, world)
    return load_pipeline(request, device, dtype), device


def open_parallel(request: PipelineRequest, world: World) -> Any:
    """The pipeline of a request, parallelized; with tensor parallelism each rank reads its part of the weights.

    Raises:
        XditCompileError: it cannot be loaded, or there is no such device.
    """
    name = find_model(request.model)
    with loading(name, request, world):
        set_logs(request, world)
        from xdit_compile.distributed.seats import coming

        with coming(world, request.plan.timeout_s, f"loading {name}"):
            return _opened(request, world)


def _opened(request: PipelineRequest, world: World) -> Any:
    from xdit_compile import from_pretrained, parallelize

    if request.plan.tensor == 1:
        pipe, _ = open_pipeline(request, world)
        return pipe if request.enable_sequential_cpu_offload else parallelize(pipe, request.plan)
    device, dtype = placement(request, world)
    try:
        pipe = from_pretrained(find_model(request.model), request.plan, device=device, dtype=dtype, **_hub(request))
    except XditCompileError:
        raise
    except Exception as error:
        raise XditCompileError(f"--model {request.model} cannot be loaded: {one_line(error)}") from error
    return _saving_memory(pipe, request)


def call_arguments(pipe: Any, request: PipelineRequest, /, **others: Any) -> tuple[dict[str, Any], list[str]]:
    """What of the request and of ``others`` this pipeline's call takes, and the flags it does not.

    The generator is among them where the call takes one, for ``call_pipeline`` to fill in.

    Raises:
        UsageError: two flags give the same argument of this pipeline.
        XditCompileError: the pipeline needs an argument that no flag gives.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    asked = {name: _one_or_list(getattr(request, name, None)) for name in _PASSED_ON}
    asked[_BINNING] = request.binning if _BINNING in parameters else request.use_resolution_binning
    arguments = {name: value for name, value in {**asked, **others}.items() if value is not None}
    spelling = {name: name if name in parameters else _OTHER_SPELLINGS.get(name, name) for name in arguments}
    _check_apart(spelling, set(parameters))
    taken = {spelling[name]: value for name, value in arguments.items() if spelling[name] in parameters}
    if "output_type" in parameters:
        taken["output_type"] = "latent" if getattr(request, "output_type", None) == "latent" else "np"
    if _GENERATOR in parameters:
        taken[_GENERATOR] = None
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.kind in positional and parameter.default is parameter.empty and name not in taken
    ]
    if missing == ["image"]:
        raise UsageError("the pipeline starts from a picture; give --image FILE")
    if missing:
        raise XditCompileError(
            f"the pipeline needs {', '.join(missing)}, which no flag gives; give --set NAME=VALUE, or use Python"
        )
    return taken, [PICTURES.get(name, f"--{name}") for name in arguments if spelling[name] not in parameters]


def _check_apart(spelling: dict[str, str], parameters: set[str]) -> None:
    """See that no two flags stand for one argument of a pipeline's call.

    Raises:
        UsageError: two do.
    """
    by_argument: dict[str, str] = {}
    for name, argument in spelling.items():
        other = by_argument.setdefault(argument, name)
        if other != name and argument in parameters:
            one, two = (PICTURES.get(each, f"--{each}") for each in (other, name))
            raise UsageError(f"{one} and {two} are one argument of this pipeline, {argument}; give one of them")


def _one_or_list(value: Any) -> Any:
    """Prompts as pipelines take them: text, or a list where there are several."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else list(value)


def call_pipeline(pipe: Any, arguments: dict[str, Any], seed: int | Sequence[int]) -> tuple[Any, float]:
    """Call a pipeline; what it draws depends on the seed alone, or for each picture on a seed of its own.

    Args:
        arguments: those of ``call_arguments``.

    Returns:
        Its result, and the seconds it took until the device had done everything.
    """
    import torch

    from xdit_compile.distributed.devices import finish

    seeds = [seed] if isinstance(seed, int) else list(seed)
    torch.manual_seed(seeds[0])
    if _GENERATOR in arguments:
        generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
        arguments = {**arguments, _GENERATOR: generators[0] if isinstance(seed, int) else generators}
    finish()
    start = time.perf_counter()
    with torch.no_grad():
        result = pipe(**arguments)
    finish()
    return result, time.perf_counter() - start


def guidance_seen(pipe: Any, images: int) -> bool:
    """Whether the latest call of a parallelized pipeline had branches of guidance, as far as it says or its denoisers
    were called with more samples than ``images``."""
    from xdit_compile.api import runner_of
    from xdit_compile.runtime.diffusers_pipeline import denoisers

    said = getattr(pipe, "do_classifier_free_guidance", None)
    if isinstance(said, bool):
        return said
    runners = [runner for _, module in denoisers(pipe) if (runner := runner_of(module)) is not None]
    calls = [runner.calls.latest for runner in runners if runner.calls]
    return any(len(fake) >= 2 * images for call in calls if call is not None for fake in call.made if fake.dim() > 2)


def leave() -> None:
    """Leave the process group, where there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def processes(size: int) -> str:
    """A number of processes in words."""
    return "1 process" if size == 1 else f"{size} processes"


def say(world: World, line: str) -> None:
    """Print a line, once for all ranks."""
    if world.rank == 0:
        print(line, flush=True)


def warn(world: World, line: str) -> None:
    """Warn in our log, once for all ranks: something that was asked for is lost."""
    if world.rank == 0:
        OURS.warning("%s", line)
