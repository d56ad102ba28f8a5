"""Requests as programs make them: from threads, in inference mode, from other pipelines, of many sizes, read or not."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import diffusers
import pair
import pytest
import torch
from zoo import Draw
from zoo_pipelines import PIPELINES

import xdit_compile
from xdit_compile import Plan
from xdit_compile.api import runner_of
from xdit_compile.errors import AgreementError, UsageError

PAIR = pair.Pair()
SD3 = PIPELINES["sd3"]


@pytest.fixture(autouse=True, scope="module")
def end_the_pair() -> Iterator[None]:
    yield
    PAIR.end()


def split(**degrees: Any) -> Any:
    return xdit_compile.parallelize(SD3.build(), Plan(backend="eager", timeout_s=20, **degrees))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def from_threads(rank: int, memory: dict) -> list[float]:
    expected, pipe, found = SD3.call(SD3.build()), split(ulysses=2), []
    threads = [threading.Thread(target=lambda: found.append(SD3.call(pipe))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [difference(each, expected) for each in found]


def test_threads_take_turns() -> None:
    for differences in PAIR.run(from_threads):
        assert len(differences) == 3 and max(differences) <= 2e-5


def in_inference_mode(rank: int, memory: dict) -> list[float]:
    expected, found = SD3.call(SD3.build()), []
    for degrees in ({"tensor": 2}, {"pipefusion": 2, "warmup_steps": 2}, {"distrifusion": 2, "warmup_steps": 2}):
        pipe = split(**degrees)
        with torch.inference_mode():
            found += [SD3.call(pipe), SD3.call(pipe)]
        found.append(SD3.call(pipe))
    return [difference(each, expected) for each in found]


def test_requests_in_inference_mode() -> None:
    for differences in PAIR.run(in_inference_mode):
        assert len(differences) == 9 and max(differences) <= 2e-5


def from_another_pipeline(rank: int, memory: dict) -> tuple[list[float], str]:
    arguments = {name: value for name, value in SD3.arguments(Draw(0)).items() if name not in ("height", "width")}
    arguments |= {"image": torch.rand(1, 3, 112, 176, generator=torch.Generator().manual_seed(1))}
    arguments |= {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}
    unsplit = diffusers.StableDiffusion3Img2ImgPipeline(**SD3.build().components)
    torch.manual_seed(0)
    expected = unsplit(**arguments)[0]
    pipe = split(ulysses=2)
    other = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    found = []
    for _ in range(2):
        torch.manual_seed(rank)
        found.append(difference(other(**arguments)[0], expected))
        xdit_compile.parallelize(other, Plan(backend="eager", timeout_s=20, ulysses=2))
    found.append(difference(SD3.call(pipe), SD3.call(SD3.build())))
    try:
        xdit_compile.parallelize(diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe), Plan(ring=2))
    except UsageError as error:
        return found, str(error)
    return found, "nothing"


def test_a_pipeline_made_of_another_s_modules_makes_requests() -> None:
    for differences, refusal in PAIR.run(from_another_pipeline):
        assert len(differences) == 3 and max(differences) <= 2e-5
        assert "parallelized already" in refusal


def latents_read_on_one(rank: int, memory: dict) -> tuple[str, float, float]:
    pipe = split(pipefusion=2)
    expected = SD3.call(pipe, steps=4)

    def read(pipe: Any, step: int, time: Any, given: dict) -> dict:
        if rank == 0 and step == 2:
            given["latents"].sum().item()
        return {}

    begin, said = time.monotonic(), "nothing"
    try:
        SD3.call(pipe, steps=4, callback_on_step_end=read)
    except AgreementError as error:
        said = str(error)
    return said, time.monotonic() - begin, difference(SD3.call(pipe, steps=4), expected)


def test_latents_that_one_rank_reads_are_told() -> None:
    for said, seconds, again in PAIR.run(latents_read_on_one):
        assert "rank " in said and "every rank must make the same calls" in said
        assert seconds < 10 and again <= 2e-5


def decoded_on_one(rank: int, memory: dict) -> tuple[str, str, float]:
    pipe = split(ulysses=2, vae="patch")
    expected = SD3.call(SD3.build(), output="np")
    latents = torch.randn(1, 6, 12, 20, generator=torch.Generator().manual_seed(0))
    pipe.vae.decode(latents)
    heard = Heard()
    logging.getLogger("xdit_compile").addHandler(heard)
    said = "nothing"
    try:
        if rank == 1:
            time.sleep(7)
            SD3.call(pipe, output="np")
        else:
            pipe.vae.decode(latents)
    except AgreementError as error:
        said = str(error)
    logging.getLogger("xdit_compile").removeHandler(heard)
    return said, " ".join(heard.lines), difference(SD3.call(pipe, output="np"), expected)


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_a_picture_that_one_rank_decodes_is_told() -> None:
    waiting, other = PAIR.run(decoded_on_one)
    assert "rank 0 waits in" in waiting[1] and "of decode 0" in waiting[1] and "rank 1" in waiting[1]
    for said, _, again in (waiting, other):
        assert "rank " in said and "the start" in said and "decode" in said and again <= 2e-5


def of_many_sizes(rank: int, memory: dict) -> tuple[list[float], list[int]]:
    unsplit, pipe = SD3.build(), split(ulysses=2, max_programs=2)
    found, kept = [], []
    for rows in (112, 128, 112, 144, 112, 160, 128):
        found.append(difference(SD3.call(pipe, height=rows), SD3.call(unsplit, height=rows)))
        kept = [one for known in runner_of(pipe.transformer).prepared.values() for one in known]
    inputs = [[node.meta["val"] for node in one.analysis.program.root.graph.find_nodes(op="placeholder")] for one in kept]
    return found, [max(each.shape[-2] for each in leaves if each.dim() == 4) for leaves in inputs]


def test_of_more_programs_the_least_recently_used_is_dropped() -> None:
    for differences, rows in PAIR.run(of_many_sizes):
        assert max(differences) <= 2e-5
        assert rows == [20, 16]
