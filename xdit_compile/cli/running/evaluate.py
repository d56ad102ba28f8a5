"""One rank of an ``evaluate`` command: the same captions and seeds without and with the plan, compared by rank 0."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xdit_compile.cli.options.evaluation_request import DEFAULT_COUNT, KEPT, EvaluationRequest, read_prompts
from xdit_compile.distributed.world import World
from xdit_compile.errors import XditCompileError, one_line

from .output import Pixels, pixels_of, whole_file, write
from .pipeline_call import call_arguments, call_pipeline, leave, open_pipeline, processes, say

if TYPE_CHECKING:
    import torch

    from xdit_compile.evaluation.prompts import Question

ONE_PROCESS = "one process"
REFERENCE, PLAN = "reference", "plan"


def evaluate(request: EvaluationRequest, world: World) -> None:
    """Make all pictures both ways; rank 0 compares them, writes the report and speaks.

    The pipeline as it is runs first, each rank on its share of the batches; then the plan runs on all of them.

    Raises:
        XditCompileError: with a line that says what to change.
    """
    from xdit_compile.api import parallelize

    pipe, device = open_pipeline(request, world)
    _make_folder(request, world)
    batches = _batches(_questions(request), request.batch_size)
    arguments, ignored = call_arguments(pipe, request, prompt=_captions(batches[0]))
    if "prompt" not in arguments:
        raise XditCompileError("this pipeline takes no prompt; evaluate needs one that does")
    if ignored:
        say(world, f"ignored, this pipeline does not take them: {', '.join(ignored)}")
    pipe.set_progress_bar_config(disable=True)
    share = range(world.rank, len(batches), world.size) if request.reference is None else range(0)
    mine = _pictures(pipe, arguments, [batches[index] for index in share], world, ONE_PROCESS) if share else []
    parallelize(pipe, request.plan)
    gathered = _gathered(dict(zip(share, mine, strict=True)), world)
    if world.rank == 0:
        if request.reference is None:
            reference = np.concatenate([gathered[index] for index in range(len(batches))])
        else:
            reference = _read_images(Path(request.reference), sum(map(len, batches)))
        if request.images:
            _keep(request, reference)
    plan = np.concatenate(_pictures(pipe, arguments, batches, world, describe(request)))
    leave()
    if world.rank == 0:
        _report(request, world, list(itertools.chain(*batches)), plan, reference, device)


def _make_folder(request: EvaluationRequest, world: World) -> None:
    if world.rank == 0:
        folder = Path(request.output)
        (folder / "images" if request.images else folder).mkdir(exist_ok=True, parents=True)


def describe(request: EvaluationRequest) -> str:
    """The plan in a few words: its degrees above one."""
    fields = dataclasses.asdict(request.plan)
    degrees = {name: value for name, value in fields.items() if type(value) is int and value > 1}
    return "plan: " + (" ".join(f"{name} {value}" for name, value in degrees.items()) or "one rank")


def _questions(request: EvaluationRequest) -> list[Question]:
    from xdit_compile.evaluation.prompts import held_out_captions, questions

    if request.prompts is None:
        captions = held_out_captions(request.seed, request.num_prompts or DEFAULT_COUNT)
    else:
        captions = read_prompts(request.prompts)[: request.num_prompts]
    return questions(captions, request.seed)


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    return [list(questions[start : start + size]) for start in range(0, len(questions), size)]


def _captions(batch: Iterable[Question]) -> list[str]:
    return [question.caption for question in batch]


def _pictures(
    pipe: Any, arguments: dict[str, Any], batches: list[list[Question]], world: World, title: str
) -> list[np.ndarray]:
    """The pictures of each batch as ``(n, height, width, 3)``, uint8; rank 0 shows how far it is."""
    from rich.console import Console
    from rich.progress import track

    made, seconds = [], 0.0
    console = Console(stderr=True)
    hidden = world.rank != 0 or not console.is_terminal
    for batch in track(batches, title, console=console, transient=True, disable=hidden):
        result, took = call_pipeline(
            pipe, {**arguments, "prompt": _captions(batch)}, [question.seed for question in batch]
        )
        made.append(_rgb(pixels_of(result), len(batch)))
        seconds += took
    say(world, f"{title}: {sum(map(len, made))} pictures on rank 0, {seconds:.1f} s")
    return made


def _rgb(pixels: Pixels, count: int) -> np.ndarray:
    if pixels.is_video:
        raise XditCompileError("this pipeline makes videos; evaluate compares pictures, generate --compare a video")
    images = pixels.bytes()
    if len(images) != count:
        raise XditCompileError(f"the pipeline made {len(images)} pictures of {count} prompts; try --batch_size 1")
    return np.repeat(images, 3, -1) if images.shape[-1] == 1 else images[..., :3]


def _gathered(mine: dict[int, np.ndarray], world: World) -> dict[int, np.ndarray]:
    """The batches of all ranks by their place, on rank 0; the process group's timeout bounds the wait."""
    if world.size == 1:
        return mine
    import torch.distributed as dist

    shares: list[Any] = [None] * world.size
    dist.gather_object(mine, shares if world.rank == 0 else None, dst=0)
    return {place: images for share in shares if share for place, images in share.items()}


def _report(
    request: EvaluationRequest,
    world: World,
    questions: list[Question],
    plan: np.ndarray,
    reference: np.ndarray,
    device: torch.device,
) -> None:
    from xdit_compile.evaluation.fidelity import fidelity
    from xdit_compile.evaluation.frechet import inception_features, scene_features
    from xdit_compile.evaluation.sheet import contact_sheet
    from xdit_compile.evaluation.table import render

    if plan.shape != reference.shape:
        raise XditCompileError(
            f"the plan's pictures {plan.shape} are of another form than one process's {reference.shape}"
        )
    extract = inception_features(device) if request.features == "inception" else scene_features()
    figures = fidelity(questions, plan, reference, request.features, extract)
    folder = Path(request.output)
    with whole_file(folder / "report.json") as file:
        file.write_text(
            json.dumps(_settings(request, world, plan) | figures.to_json(), indent=1, allow_nan=False) + "\n"
        )
    with whole_file(folder / "sheet.png") as file:
        contact_sheet(figures.pairs, plan, reference, (ONE_PROCESS, describe(request))).save(file)
    if request.images:
        _write_images(folder, PLAN, plan)
    say(world, render(figures))
    say(world, f"wrote {folder / 'report.json'} and {folder / 'sheet.png'}; {processes(world.size)}")


def _settings(request: EvaluationRequest, world: World, plan: np.ndarray) -> dict[str, Any]:
    """What was asked for, so that the figures can be made again; the size is that of the pictures."""
    fields = dataclasses.asdict(request)
    fields |= {"height": plan.shape[1], "width": plan.shape[2], "prompts": request.prompts or "held-out captions"}
    return {"settings": {**fields, "num_prompts": len(plan), "processes": world.size}}


def _keep(request: EvaluationRequest, reference: np.ndarray) -> None:
    """Write the pictures of one process, so that other plans can be compared with them."""
    folder = Path(request.output)
    _write_images(folder, REFERENCE, reference)
    with whole_file(folder / KEPT) as file:
        file.write_text(json.dumps(request.asked, indent=1) + "\n")


def _write_images(folder: Path, name: str, images: np.ndarray) -> None:
    for index, image in enumerate(images):
        write(Pixels(image[None].astype(np.float32) / 255), str(folder / _file(index, name)), fps=1)


def _read_images(folder: Path, count: int) -> np.ndarray:
    from PIL import Image

    try:
        return np.stack([np.asarray(Image.open(folder / _file(index, REFERENCE))) for index in range(count)])
    except (OSError, ValueError) as error:
        raise XditCompileError(
            f"the pictures of one process in {folder} cannot be read: {one_line(error)}; leave out --reference"
        ) from error


def _file(index: int, name: str) -> str:
    return f"images/{index:04}-{name}.png"
