"""One rank of a ``generate`` command: load, parallelize, run, write, compare."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdit_compile.cli.options.answer import answering
from xdit_compile.cli.options.expected import expected_difference
from xdit_compile.cli.options.request import Request
from xdit_compile.cli.options.result_kind import kind_of
from xdit_compile.cli.processes.speech import show_phases
from xdit_compile.distributed.world import World

from .lost_input import listening, one_line_of
from .output import Latents, Pixels, difference
from .pipeline_call import guidance_seen, leave, open_parallel, placement, processes, say, warn
from .repeats import prepared, repeated
from .saving import made_with, save
from .unsplit_reference import reference

TAUGHT = "the embedded pipeline speaks of coloured shapes, their sizes, places and backgrounds; --model names another"


def generate(request: Request, world: World) -> None:
    """Make what the request asks for; rank 0 writes the file and speaks.

    Raises:
        XditCompileError: with a line that says what to change.
    """
    with answering(request.json) as answer:
        made = _made(request, world, answer)
        show_phases(request, world).between("the processes end")
        leave()
        if request.compare and world.rank == 0:
            _compare(request, world, made, answer)
        if world.rank > 0:
            answer.clear()


def _made(request: Request, world: World, answer: dict[str, Any]) -> Pixels | Latents:
    """What was asked for, written; nothing of the pipeline is held any more when this returns."""
    pipe = open_parallel(request, world)
    request = request.settled_for(kind_of(pipe), world)
    arguments, ignored = prepared(pipe, request)
    lost: list[str] = []

    def tell(line: str) -> None:
        lost.append(line)
        warn(world, line)

    def tell_unread(line: str) -> None:
        tell(line)
        if request.model is None and TAUGHT not in lost:
            tell(TAUGHT)

    if ignored:
        tell(f"{', '.join(ignored)} has no effect: this pipeline does not take it")
    shown = show_phases(request, world)
    shown.between("the pipeline runs")
    pipe.set_progress_bar_config(**shown.steps())
    with listening(pipe if world.rank == 0 else None, _texts(request), tell_unread):
        made, runs = repeated(pipe, arguments, request, world)
    if request.negative_prompt and getattr(pipe, "do_classifier_free_guidance", None) is False:
        tell("--negative_prompt had no effect: the pipeline ran without guidance")
    seconds = statistics.median(runs)
    if request.method_chosen and guidance_seen(pipe, len(request.prompt) * (request.num_images_per_prompt or 1)):
        say(world, "the pipeline ran with guidance: --use_cfg_parallel shares its branches among 2 of the processes")
    if world.rank == 0:
        facts = [made_with(request, prompt, seed, _steps(pipe, arguments)) for prompt, seed in _of_each(request, made)]
        kind = "videos" if isinstance(made, Pixels) and made.is_video else "images"
        files = save(made, request.file(kind), request.fps, () if request.no_metadata else facts, request.overwrite)
        _say_files(world, files, facts)
        say(world, f"{_describe(made)}, {seconds:.1f} s on {processes(world.size)}")
        answer |= {
            "files": _answered(files, facts), "shape": list(made.values.shape), "seconds": seconds, "runs": runs,
            "processes": world.size, "warnings": lost, **_of_all(facts[0]), "plan": request.plan,
        }  # fmt: skip
    return made


def _texts(request: Request) -> list[tuple[str, str]]:
    """Flags with the texts that they gave; the longest first, which is no part of another."""
    several = len(request.prompt) > 1
    texts = [(f"--prompt {index}" if several else "--prompt", text) for index, text in enumerate(request.prompt, 1)]
    texts += [("--negative_prompt", request.negative_prompt)] if request.negative_prompt else []
    return sorted(texts, key=lambda pair: -len(pair[1]))


def _of_each(request: Request, made: Pixels | Latents) -> Iterator[tuple[str, int]]:
    """The prompt and the seed of each picture, in order: those of one prompt follow one another."""
    count = len(made.values) if isinstance(made, Pixels) else len(request.prompt) * (request.num_images_per_prompt or 1)
    each = max(1, count // len(request.prompt))
    for index in range(count):
        yield request.prompt[min(index // each, len(request.prompt) - 1)], request.seed + index


def _steps(pipe: Any, arguments: dict[str, Any]) -> int | None:
    """The steps of a call: those asked for, or the pipeline's own number."""
    name = "num_inference_steps"
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name)
    default = parameter.default if parameter is not None and isinstance(parameter.default, int) else None
    return arguments.get(name, default)


def _answered(files: list[Path], facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is answered of each picture: several latents are in one file."""
    names = [str(file) for file in files] * (len(facts) if len(files) == 1 else 1)
    return [
        {"path": name, "prompt": fact["prompt"], "seed": fact["seed"]} for name, fact in zip(names, facts, strict=True)
    ]


def _of_all(facts: dict[str, Any]) -> dict[str, Any]:
    """What all pictures of a call have in common."""
    return {name.lower(): fact for name, fact in facts.items() if name not in ("prompt", "seed")}


def _say_files(world: World, files: list[Path], facts: list[dict[str, Any]]) -> None:
    """A line for each picture."""
    for each in _answered(files, facts):
        say(world, f"wrote {each['path']}: seed {each['seed']}, {one_line_of(each['prompt'])}")


def _compare(request: Request, world: World, made: Pixels | Latents, answer: dict[str, Any]) -> None:
    """Run the unsplit pipeline and say how far the split one's picture lies from its."""
    _give_back_memory(request, world)
    show_phases(request, world).between("the unsplit pipeline runs")
    unsplit, seconds = reference(request)
    apart = difference(made, unsplit)
    say(world, f"unsplit pipeline: {seconds:.1f} s on 1 process")
    say(world, f"split against unsplit: {apart}")
    expected = expected_difference(request.plan)
    if expected is not None:
        say(world, expected if apart.psnr is None else f"{expected}; this one has {apart.psnr:.1f} dB")
    answer["compare"] = {**dataclasses.asdict(apart), "seconds_unsplit": seconds, "expected": expected}


def _give_back_memory(request: Request, world: World) -> None:
    """End the pipeline, which modules and what stands in their place hold in circles, and what is kept of its memory.

    Another process is about to load a whole one on the same device.
    """
    from xdit_compile.ir.peak_memory import release_unused

    gc.collect()
    release_unused(placement(request, world)[0])


def _describe(made: Pixels | Latents) -> str:
    if isinstance(made, Latents):
        return f"latents of shape {list(made.values.shape)}"
    count, *frames, height, width, _ = made.values.shape
    kind = f"video of {frames[0]} frames" if frames else "image"
    return f"{count} {kind}{'s' if count > 1 and not frames else ''}, {width} x {height} pixels"
