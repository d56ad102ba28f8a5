"""One rank of an ``evaluate`` command: the same captions and seeds without and with the plan, compared by rank 0."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xdit_compile.cli.inputs.asked import prompts_in
from xdit_compile.cli.options.answer import answering
from xdit_compile.cli.options.destination import check_made
from xdit_compile.cli.options.evaluation_request import (
    KEPT,
    PLAN,
    REFERENCE,
    EvaluationRequest,
    picture_name,
)
from xdit_compile.cli.options.request import find_model
from xdit_compile.cli.options.result_kind import kind_of
from xdit_compile.cli.processes.speech import loading, show_phases
from xdit_compile.distributed.world import World
from xdit_compile.errors import XditCompileError, one_line
from xdit_compile.plan import Plan

from .lost_input import listening
from .output import Pixels, pixels_of
from .pipeline_call import call_arguments, call_pipeline, leave, open_pipeline, processes, say, warn
from .saving import elsewhere, made_with, whole_file, write

if TYPE_CHECKING:
    import torch

    from xdit_compile.cli.processes.speech import Phases
    from xdit_compile.evaluation.prompts import Question

ONE_PROCESS = "one process"
MOST_LINES = 5
"""Prompts of which it is said what is lost of them."""


def evaluate(request: EvaluationRequest, world: World) -> None:
    """Make all pictures both ways; rank 0 compares them, writes the report and speaks.

    The pipeline as it is runs first, each rank on its share of the batches; then the plan runs on all of them.

    Raises:
        XditCompileError: with a line that says what to change.
    """
    with answering(request.json) as answer:
        figures = _evaluated(request, world)
        if world.rank == 0:
            answer |= figures


def _evaluated(request: EvaluationRequest, world: World) -> dict[str, Any]:
    """The report, on rank 0."""
    from xdit_compile.api import parallelize

    with loading(find_model(request.model), request, world):
        pipe, device = open_pipeline(request, world)
    check_made(kind_of(pipe), ("images",))
    _make_folder(request, world)
    batches = _batches(_questions(request), request.batch_size)
    shown = show_phases(request, world)
    arguments, ignored = call_arguments(pipe, request, prompt=_captions(batches[0]))
    if "prompt" not in arguments:
        raise XditCompileError("this pipeline takes no prompt; evaluate needs one that does")
    if ignored:
        warn(world, f"{', '.join(ignored)} has no effect: this pipeline does not take it")
    pipe.set_progress_bar_config(disable=True)
    share = range(world.rank, len(batches), world.size) if request.reference is None else range(0)
    told: list[str] = []
    captions = [("--prompts", caption) for batch in batches for caption in _captions(batch)] if request.prompts else []
    mine: list[np.ndarray] = []
    with listening(pipe if world.rank == 0 and share else None, captions, told.append):
        if share:
            mine = _pictures(pipe, arguments, [batches[index] for index in share], world, ONE_PROCESS, shown)
    parallelize(pipe, request.plan)
    gathered = _gathered(dict(zip(share, mine, strict=True)), world)
    if world.rank == 0:
        if request.reference is None:
            reference = np.concatenate([gathered[index] for index in range(len(batches))])
        else:
            reference = _read_images(Path(request.reference), sum(map(len, batches)))
        kept = not request.images or _kept(request, reference)
    with listening(pipe if world.rank == 0 else None, captions, told.append):
        plan = np.concatenate(_pictures(pipe, arguments, batches, world, describe(request), shown))
    shown.between("comparing the pictures")
    leave()
    _say_lost(world, list(dict.fromkeys(told)))
    if world.rank > 0:
        return {}
    return _report(request, world, list(itertools.chain(*batches)), plan, reference, device, kept)


def _say_lost(world: World, lines: Sequence[str]) -> None:
    for line in lines[:MOST_LINES]:
        warn(world, line)
    if len(lines) > MOST_LINES:
        warn(world, f"and {len(lines) - MOST_LINES} more such lines of other prompts")


def _make_folder(request: EvaluationRequest, world: World) -> None:
    if world.rank == 0:
        folder = Path(request.output)
        (folder / "images" if request.images else folder).mkdir(exist_ok=True, parents=True)


def describe(request: EvaluationRequest) -> str:
    """The plan in a few words: its degrees above one."""
    return "plan: " + (" ".join(f"{name} {getattr(request.plan, name)}" for name in request.plan.used) or "one rank")


def _questions(request: EvaluationRequest) -> list[Question]:
    from xdit_compile.evaluation.prompts import held_out_captions, questions

    if request.prompts is None:
        captions = held_out_captions(request.seed, request.count)
    else:
        captions = prompts_in(request.prompts, "--prompts")[: request.num_prompts]
    return questions(captions, request.seed)


def _batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    return [list(questions[start : start + size]) for start in range(0, len(questions), size)]


def _captions(batch: Iterable[Question]) -> list[str]:
    return [question.caption for question in batch]


def _pictures(
    pipe: Any, arguments: dict[str, Any], batches: list[list[Question]], world: World, title: str, shown: Phases
) -> list[np.ndarray]:
    """The pictures of each batch as ``(n, height, width, 3)``, uint8; rank 0 shows how far it is."""
    from rich.console import Console
    from rich.progress import track

    made, seconds = [], 0.0
    console = Console(stderr=True)
    hidden = not shown.shows or not console.is_terminal
    shown.between(f"{title}: batch 1 of {len(batches)}")
    for batch in track(batches, title, console=console, transient=True, disable=hidden):
        result, took = call_pipeline(
            pipe, {**arguments, "prompt": _captions(batch)}, [question.seed for question in batch]
        )
        made.append(_rgb(pixels_of(result), len(batch)))
        seconds += took
        shown.further(f"{title}: {len(made)} of {len(batches)} batches done")
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
    kept: bool,
) -> dict[str, Any]:
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
    report = _settings(request, world, plan) | figures.to_json()
    say(world, render(figures))
    sheet = contact_sheet(figures.pairs, plan, reference, (ONE_PROCESS, describe(request)))
    folder = _written(request, json.dumps(report, indent=1, allow_nan=False) + "\n", sheet, plan, reference, kept)
    say(world, f"wrote {folder / 'report.json'} and {folder / 'sheet.png'}; {processes(world.size)}")
    return {**report, "files": [folder / "report.json", folder / "sheet.png"]}


def _written(
    request: EvaluationRequest, report: str, sheet: Any, plan: np.ndarray, reference: np.ndarray, kept: bool
) -> Path:
    """The folder with everything in it, which was asked for.

    Args:
        kept: whether nothing of one process is still to be written.

    Raises:
        XditCompileError: it could not be written; says where everything is.
    """

    def write_all(folder: Path, kept: bool = False) -> Path:
        with whole_file(folder / "report.json", request.overwrite) as file:
            file.write_text(report)
        with whole_file(folder / "sheet.png", request.overwrite) as file:
            sheet.save(file)
        if request.images:
            _write_images(request, folder, PLAN, plan)
            if not kept:
                _keep(request, folder, reference)
        return folder

    try:
        return write_all(Path(request.output), kept)
    except OSError as error:
        instead = elsewhere(write_all)
        files = "report.json, sheet.png and images" if request.images else "report.json and sheet.png"
        place = f"went to {instead}" if instead else "could be kept nowhere else and are lost"
        raise XditCompileError(
            f"--output {request.output} cannot be written: {error.strerror or one_line(error)}; {files} {place}"
        ) from error


def _settings(request: EvaluationRequest, world: World, plan: np.ndarray) -> dict[str, Any]:
    """What was asked for, so that the figures can be made again; the size is that of the pictures."""
    fields = {name: value for name, value in dataclasses.asdict(request).items() if name not in ("json", "overwrite")}
    fields |= {"height": plan.shape[1], "width": plan.shape[2], "prompts": request.prompts or "held-out captions"}
    return {"settings": {**fields, "num_prompts": len(plan), "processes": world.size}}


def _kept(request: EvaluationRequest, reference: np.ndarray) -> bool:
    """Write the pictures of one process while the plan's are still to be made; whether that could be done."""
    try:
        _keep(request, Path(request.output), reference)
    except OSError:
        return False
    return True


def _keep(request: EvaluationRequest, folder: Path, reference: np.ndarray) -> None:
    """Write the pictures of one process, so that other plans can be compared with them."""
    _write_images(request, folder, REFERENCE, reference)
    with whole_file(folder / KEPT, request.overwrite) as file:
        file.write_text(json.dumps(request.asked, indent=1) + "\n")


def _write_images(request: EvaluationRequest, folder: Path, which: str, images: np.ndarray) -> None:
    questions = _questions(request)
    for index, image in enumerate(images):
        pixels = Pixels(image[None].astype(np.float32) / 255)
        of = dataclasses.replace(request, plan=Plan()) if which == REFERENCE else request
        facts = made_with(of, questions[index].caption, questions[index].seed, request.num_inference_steps)
        about = () if request.no_metadata else (facts,)
        write(pixels, str(folder / picture_name(index, which)), 1, about, request.overwrite)


def _read_images(folder: Path, count: int) -> np.ndarray:
    from PIL import Image

    try:
        return np.stack([np.asarray(Image.open(folder / picture_name(index, REFERENCE))) for index in range(count)])
    except (OSError, ValueError) as error:
        raise XditCompileError(
            f"the pictures of one process in {folder} cannot be read: {one_line(error)}; leave out --reference"
        ) from error
