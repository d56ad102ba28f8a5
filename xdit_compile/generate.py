"""One rank of a ``generate`` command: load, parallelize, run, write, compare."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any

from .errors import UsageError, XditCompileError, one_line
from .output import Pixels, difference, pixels_of, write
from .request import DTYPES, Request, find_model
from .world import World

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
_OTHER_SPELLINGS = {"num_frames": "video_length"}


def generate(request: Request, world: World) -> None:
    """Make what the request asks for; rank 0 writes the file and speaks.

    Raises:
        XditCompileError: with a line that says what to change.
    """
    from .api import parallelize, restore

    if not request.debug:
        quieten()
    device, dtype = placement(request, world)
    pipe = load_pipeline(request, device, dtype)
    arguments, ignored = call_arguments(pipe, request)
    if ignored:
        _say(world, f"ignored, this pipeline does not take them: {', '.join(ignored)}")
    pipe.set_progress_bar_config(disable=world.rank != 0)
    parallelize(pipe, request.plan)
    pixels, seconds = _run(pipe, arguments, request.seed)
    if world.rank == 0:
        files = ", ".join(str(file) for file in write(pixels, request.output, request.fps))
        _say(world, f"wrote {files}: {_describe(pixels)}, {seconds:.1f} s on {_processes(world.size)}")
    if request.compare:
        restore(pipe)
        if world.rank == 0:
            reference, seconds = _run(pipe, arguments, request.seed)
            _say(world, f"unsplit pipeline: {seconds:.1f} s on 1 process")
            _say(world, f"split against unsplit: {difference(pixels, reference)}")
    _leave()


def quieten() -> None:
    """Keep the libraries' warnings and loading bars off the terminal."""
    import warnings

    import diffusers
    import transformers

    warnings.filterwarnings("ignore")
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def placement(request: Request, world: World) -> tuple[torch.device, torch.dtype]:
    """This rank's device and the weights' dtype.

    Raises:
        UsageError: CUDA is asked for and there is none for this rank.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = request.device if request.device != "auto" else "cuda" if count else "cpu"
    if kind == "cuda" and world.local_rank >= count:
        raise UsageError(f"rank {world.rank} has no CUDA device ({count} here); start fewer ranks or give --device cpu")
    name = DTYPES.get(request.dtype) or ("bfloat16" if kind == "cuda" else "float32")
    if kind == "cpu":
        return torch.device("cpu"), getattr(torch, name)
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank), getattr(torch, name)


def load_pipeline(request: Request, device: torch.device, dtype: torch.dtype) -> Any:
    """The unmodified diffusers pipeline on its device.

    Raises:
        XditCompileError: it cannot be loaded, with the reason in one line.
    """
    from diffusers import DiffusionPipeline

    name = find_model(request.model)
    try:
        return DiffusionPipeline.from_pretrained(name, dtype=dtype).to(device)
    except Exception as error:
        raise XditCompileError(f"--model {name} cannot be loaded: {one_line(error)}") from error


def call_arguments(pipe: Any, request: Request) -> tuple[dict[str, Any], list[str]]:
    """What of the request this pipeline's call takes, and the flags it does not.

    Raises:
        XditCompileError: the pipeline needs an argument that no flag gives.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    given = {name: getattr(request, name) for name in _PASSED_ON if getattr(request, name) is not None}
    spelling = {name: name if name in parameters else _OTHER_SPELLINGS.get(name, name) for name in given}
    taken = {spelling[name]: value for name, value in given.items() if spelling[name] in parameters}
    if "output_type" in parameters:
        taken["output_type"] = "np"
    positional = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.kind in positional and parameter.default is parameter.empty and name not in taken
    ]
    if missing:
        raise XditCompileError(f"the pipeline needs {', '.join(missing)}, which no flag gives; use the Python API")
    return taken, [f"--{name}" for name in given if spelling[name] not in parameters]


def _run(pipe: Any, arguments: dict[str, Any], seed: int) -> tuple[Pixels, float]:
    import torch

    torch.manual_seed(seed)
    if "generator" in inspect.signature(type(pipe).__call__).parameters:
        arguments = {**arguments, "generator": torch.Generator("cpu").manual_seed(seed)}
    start = time.perf_counter()
    with torch.no_grad():
        result = pipe(**arguments)
    return pixels_of(result), time.perf_counter() - start


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _describe(pixels: Pixels) -> str:
    count, *frames, height, width, _ = pixels.values.shape
    kind = f"video of {frames[0]} frames" if frames else "image"
    return f"{count} {kind}{'s' if count > 1 and not frames else ''}, {width} x {height} pixels"


def _processes(size: int) -> str:
    return "1 process" if size == 1 else f"{size} processes"


def _say(world: World, line: str) -> None:
    if world.rank == 0:
        print(line, flush=True)
