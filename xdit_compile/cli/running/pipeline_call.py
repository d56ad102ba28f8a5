"""What every command does with a pipeline: load it, find out what its call takes, call it."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from xdit_compile.cli.options.request import DTYPES, PipelineRequest, find_model
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
_OTHER_SPELLINGS = {"num_frames": "video_length"}


def set_logs(debug: bool) -> None:
    """Keep the libraries' warnings and loading bars off the terminal, or with ``debug`` show our own log, too."""
    import warnings

    if debug:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("xdit_compile").setLevel(logging.DEBUG)
        return

    import diffusers
    import transformers

    warnings.filterwarnings("ignore")
    _show_ready()
    for theirs in (diffusers.utils.logging, transformers.utils.logging):
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()


class _AboveBars(logging.Handler):
    """Prints lines above the progress bars that are open."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record))


def _show_ready() -> None:
    """Print when a call is ready, and where its graphs came from."""
    ready = logging.getLogger("xdit_compile.ready")
    ready.setLevel(logging.INFO)
    ready.propagate = False
    ready.handlers = [_AboveBars()]


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
    set_logs(request.debug)
    device, dtype = placement(request, world)
    return load_pipeline(request, device, dtype), device


def open_parallel(request: PipelineRequest, world: World) -> Any:
    """The pipeline of a request, parallelized; with tensor parallelism each rank reads its part of the weights.

    Raises:
        XditCompileError: it cannot be loaded, or there is no such device.
    """
    from xdit_compile import from_pretrained, parallelize

    if request.plan.tensor == 1:
        pipe, _ = open_pipeline(request, world)
        return pipe if request.enable_sequential_cpu_offload else parallelize(pipe, request.plan)
    set_logs(request.debug)
    device, dtype = placement(request, world)
    try:
        return from_pretrained(find_model(request.model), request.plan, device=device, dtype=dtype, **_hub(request))
    except XditCompileError:
        raise
    except Exception as error:
        raise XditCompileError(f"--model {request.model} cannot be loaded: {one_line(error)}") from error


def call_arguments(pipe: Any, request: PipelineRequest, **others: Any) -> tuple[dict[str, Any], list[str]]:
    """What of the request and of ``others`` this pipeline's call takes, and the flags it does not.

    The generator is among them where the call takes one, for ``call_pipeline`` to fill in.

    Raises:
        XditCompileError: the pipeline needs an argument that no flag gives.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    asked = {name: _one_or_list(getattr(request, name, None)) for name in _PASSED_ON}
    asked[_BINNING] = request.binning if _BINNING in parameters else request.use_resolution_binning
    arguments = {name: value for name, value in {**asked, **others}.items() if value is not None}
    spelling = {name: name if name in parameters else _OTHER_SPELLINGS.get(name, name) for name in arguments}
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
    if missing:
        raise XditCompileError(f"the pipeline needs {', '.join(missing)}, which no flag gives; use the Python API")
    return taken, [f"--{name}" for name in arguments if spelling[name] not in parameters]


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
