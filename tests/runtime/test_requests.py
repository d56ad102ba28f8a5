"""Requests as programs make them: from threads, in inference mode, from other pipelines, of many sizes, read or not."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import diffusers
import pair
import pytest
import torch
from torch.utils import _pytree as pytree
from zoo.pipelines import PIPELINES
from zoo.transformers import MODELS, Draw

import xdit_compile
from xdit_compile import Plan
from xdit_compile.api import runner_of
from xdit_compile.capture.state.in_place import found_method
from xdit_compile.distributed import liveness
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
    """Threads that come in another order on each rank, with requests of their own."""
    unsplit, pipe, found = SD3.build(), split(ulysses=2), {}
    given = {
        seed: {**SD3.arguments(Draw(seed)), "num_inference_steps": 2, "output_type": "latent"} for seed in range(3)
    }

    def ask(seed: int) -> None:
        found[seed] = pipe(generator=torch.Generator().manual_seed(seed), **given[seed]).images

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (range(3) if rank else reversed(range(3)))]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    return [difference(found[seed], SD3.call(unsplit, seed)) for seed in given]


def test_threads_take_turns_in_one_order() -> None:
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
    logging.getLogger("xdit_compile").setLevel(logging.INFO)
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
    logging.getLogger("xdit_compile").setLevel(logging.NOTSET)
    return said, " ".join(heard.lines), difference(SD3.call(pipe, output="np"), expected)


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.slow
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
        kept = list(runner_of(pipe.transformer).calls)
    inputs = [
        [node.meta["val"] for node in one.analysis.program.root.graph.find_nodes(op="placeholder")] for one in kept
    ]
    return found, [max(each.shape[-2] for each in leaves if each.dim() == 4) for leaves in inputs]


@pytest.mark.slow
def test_of_more_programs_the_least_recently_used_is_dropped() -> None:
    for differences, rows in PAIR.run(of_many_sizes):
        assert max(differences) <= 2e-5
        assert rows == [20, 16]


# ---- failures of every kind


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def outcome(pipe: Any, expected: torch.Tensor, **given: Any) -> Any:
    """The difference of a request's picture, or the type and first words of what it raised."""
    try:
        return difference(SD3.call(pipe, **given), expected)
    except BaseException as error:
        return f"{type(error).__name__}: {'' if isinstance(error, Unprintable) else error}"


def caught(pipe: Any, step: int, time: Any, given: dict) -> dict:
    """A call that fails on rank 1 alone, where a callback catches the error and goes on."""
    if torch.distributed.get_rank() == 1 and step == 0:
        with contextlib.suppress(Exception):
            pipe.transformer(torch.zeros(1, 3, 16, 16))
    return {}


def unprintable(pipe: Any, step: int, time: Any, given: dict) -> dict:
    if torch.distributed.get_rank() == 1:
        raise Unprintable
    return {}


def other_latents(pipe: Any, step: int, time: Any, given: dict) -> dict:
    last = step == 1 and torch.distributed.get_rank() == 1
    return {"latents": given["latents"] * 1.5} if last else {}


def failing(rank: int, memory: dict) -> list[Any]:
    expected, pipe, found = SD3.call(SD3.build()), split(ulysses=2), []
    for callback in (caught, unprintable, other_latents):
        found.append(outcome(pipe, expected, callback_on_step_end=callback))
        found.append(outcome(pipe, expected))
    found.append(outcome(pipe, expected, **({"nonsense": 1} if rank else {})))
    return [*found, outcome(pipe, expected)]


def test_every_failure_is_told_and_the_next_request_is_right() -> None:
    first, second = PAIR.run(failing)
    assert all(right <= 2e-5 for right in (*first[1::2], *second[1::2]))
    assert "rank 1" in first[0] and "Error" in second[0]
    assert first[2] == "AgreementError: rank 1 failed: Unprintable: Unprintable" and second[2] == "Unprintable: "
    assert "rank 1 came to another result" in first[4] and "rank 0 came to another result" in second[4]
    assert "rank 1 failed: TypeError" in first[6] and second[6].startswith("TypeError")


def bare_calls(rank: int, memory: dict) -> list[Any]:
    case = MODELS["dit"]
    args, kwargs = case.inputs()
    (expected,) = pytree.tree_leaves(case.build()(*args, **kwargs))
    module = xdit_compile.parallelize(case.build(), Plan(ulysses=2, backend="eager", timeout_s=20))

    def made(steps: int = 1, broken: bool = False) -> Any:
        try:
            with xdit_compile.generation(module) if steps > 1 else contextlib.nullcontext():
                for step in range(steps):
                    if broken and rank == 1 and step + 1 == steps:
                        raise ValueError("broken")
                    (result,) = pytree.tree_leaves(module(*args, **kwargs))
            return difference(result, expected)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    found = [made(), made(2, broken=True), made(), made(2), made()]
    for _ in range(2):
        other = (args[0] + rank, *args[1:])
        with contextlib.suppress(AgreementError):
            module(*other, **kwargs)
            found.append("nothing was raised")
        found.append(made())
    with torch.no_grad():
        for weight in module.parameters():
            weight.data.mul_(0.5)
        (expected,) = pytree.tree_leaves(found_method(module, "forward")(*args, **kwargs))
    return [*found, made()]


def test_bare_calls_are_right_again_after_failures_and_requests() -> None:
    for rank, found in enumerate(PAIR.run(bare_calls)):
        failed = found.pop(1)
        assert failed == ("ValueError: broken" if rank else "AgreementError: rank 1 failed: ValueError: broken")
        assert len(found) == 7 and all(isinstance(each, float) and each <= 2e-5 for each in found)


def nested(rank: int, memory: dict) -> list[float]:
    expected, found = SD3.call(SD3.build()), []
    pipe, other = split(pipefusion=2, warmup_steps=2), split(tensor=2)

    def inside(given: Any, step: int, time: Any, tensors: dict) -> dict:
        if step == 1:
            found.extend(difference(SD3.call(each), expected) for each in (pipe, other))
        return {}

    with contextlib.suppress(IndexError):  # the scheduler's state is the inner request's
        SD3.call(pipe, callback_on_step_end=inside)
    return [*found, difference(SD3.call(pipe), expected), difference(SD3.call(other), expected)]


def test_requests_inside_of_requests() -> None:
    for found in PAIR.run(nested):
        assert len(found) == 4 and max(found) <= 2e-5


def one_plan_after_the_other(rank: int, memory: dict) -> list[float]:
    expected, pipe, found = SD3.call(SD3.build()), SD3.build(), []
    for degrees in ({"ulysses": 2}, {"tensor": 2}, {"pipefusion": 2, "warmup_steps": 2}, {"cfg": 2}):
        xdit_compile.parallelize(pipe, Plan(backend="eager", timeout_s=20, **degrees))
        found.append(difference(SD3.call(pipe), expected))
        xdit_compile.restore(pipe)
        found.append(difference(SD3.call(pipe), expected))
    return found


@pytest.mark.slow
def test_plans_one_after_the_other() -> None:
    for found in PAIR.run(one_plan_after_the_other):
        assert max(found) <= 2e-5 and max(found[1::2]) == 0


def other_weights(rank: int, memory: dict) -> list[Any]:
    expected, pipe = SD3.call(SD3.build()), split(ulysses=2)
    found: list[Any] = [difference(SD3.call(pipe), expected)]
    weight = next(pipe.transformer.transformer_blocks[1].parameters())
    weight.data.mul_(1 + rank)
    try:
        found.append(difference(SD3.call(pipe), expected))
    except AgreementError as error:
        found.append(str(error))
    weight.data.div_(1 + rank)
    return [*found, difference(SD3.call(pipe), expected)]


def test_weights_that_change_on_one_rank_stop_all() -> None:
    for before, message, after in PAIR.run(other_weights):
        assert max(before, after) <= 2e-5 and "was called with another set of weights of transformer" in message


def given_up_at_the_end(rank: int, memory: dict) -> list[str]:
    """Rank 1 loses patience in the very moment in which rank 0 comes."""
    pipe = split(ulysses=2)
    agreement, said = runner_of(pipe.transformer).session.agreement, []
    expected = SD3.call(SD3.build())
    for late in (False, True, False, False):
        if late and rank == 1:
            agreement._compare = functools.partial(_lost, agreement, agreement._compare)
        try:
            said.append("right" if difference(SD3.call(pipe), expected) <= 2e-5 else "wrong")
        except AgreementError as error:
            said.append(str(error))
        vars(agreement).pop("_compare", None)
        if late and rank == 0:
            time.sleep(1)
    return said


def _lost(agreement: Any, compare: Any, calls: Any) -> None:
    if agreement._said == "the end":
        time.sleep(0.5)
        raise AgreementError("rank 0 did not answer")
    compare(calls)


def test_a_rank_that_gave_up_as_another_ended_is_followed() -> None:
    assert PAIR.run(given_up_at_the_end) == [
        ["right"] * 4, ["right", "rank 0 did not answer", "right", "right"],
    ]  # fmt: skip


def failed_after_the_end(rank: int, memory: dict) -> list[str]:
    """Rank 1 is in its next request, and fails there, while rank 0 still ends this one."""
    pipe = split(ulysses=2)
    agreement, said = runner_of(pipe.transformer).session.agreement, []
    expected = SD3.call(SD3.build())
    for at in range(4):
        if rank == 0 and at == 1:
            agreement._compare = functools.partial(_slowly, agreement, agreement._compare)
        said.append(str(outcome(pipe, expected, **({"nonsense": 1} if rank and at == 2 else {}))))
        vars(agreement).pop("_compare", None)
    return said


def _slowly(agreement: Any, compare: Any, calls: Any) -> None:
    if agreement._said == "the end":
        time.sleep(2)
    compare(calls)


def test_a_failure_in_the_next_request_is_none_of_this_one() -> None:
    first, second = PAIR.run(failed_after_the_end)
    assert all(float(right) <= 2e-5 for said in (first, second) for right in (said[0], said[1], said[3]))
    assert "rank 1 failed: TypeError" in first[2] and second[2].startswith("TypeError")


def test_silence_counts_while_a_rank_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that was given up may run again: the next request waits for its signs anew, as does one after a pause."""
    life = liveness.Liveness(torch.distributed.HashStore(), "talk", rank=0)
    now = [0.0]
    monkeypatch.setattr(liveness.time, "monotonic", lambda: now[0])
    found = []
    for seconds in (0, 4, 4, 60, 4):
        now[0] += seconds
        found.append(life.silence(1))
    life.forget()
    assert [*found, life.silence(1)] == [0, 4, 8, 0, 4, 0]
