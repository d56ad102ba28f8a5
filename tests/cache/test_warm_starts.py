"""New processes take over what others compiled: they capture and compile nothing, and results are the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import procs
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from zoo.pipelines import PIPELINES
from zoo.transformers import MODELS

from xdit_compile import Plan, compiler, parallelize
from xdit_compile.cache.folder import VARIABLE
from xdit_compile.cache.store import Store

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZES = ((112, 176), (80, 144))
MADE = ("captures", "passes", "dynamo frames", "graphs to inductor", "code generated", "g++ runs")
"""What processes that find all in the cache do none of."""
TOLERANCE = 2e-5


def make_pictures(rank: int, folder: str, log: str) -> tuple[dict[str, int], list[np.ndarray]]:
    """What this process had to do for four requests of two sizes, and the latents that it made."""
    from startup import counting

    case = PIPELINES["pixart"]
    with counting(Path(f"{log}-{rank}")) as counts:
        pipe = parallelize(case.build(), Plan(ulysses=2, backend="inductor", cache=folder))
        sizes = zip((*SIZES, *SIZES), range(4), strict=True)
        made = [case.call(pipe, seed, steps=3, height=height, width=width) for (height, width), seed in sizes]
    return counts, [each.numpy() for each in made]


@pytest.mark.slow
def test_new_ranks_make_nothing_and_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from startup import noting_compiler

    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", noting_compiler(tmp_path / "bin"))
    cache, numbers = tmp_path / "cache", itertools.count()

    def started() -> tuple[list[dict[str, int]], list[list[np.ndarray]]]:
        log = f"{tmp_path}/{next(numbers)}"
        ranks = procs.run(make_pictures, 2, str(cache), log, timeout=500, method="spawn")
        return [counts for counts, _ in ranks], [made for _, made in ranks]

    cold, expected = started()
    assert [counts["captures"] for counts in cold] == [len(SIZES)] * 2
    seen = {name for name in MADE if any(counts[name] for counts in cold)}
    assert seen == {*MADE} - {"dynamo frames"}, "what is counted is what happens without a cache"
    graphs = cold[0]["graphs loaded"] + cold[0]["graphs to inductor"]

    def assert_same(made: list[list[np.ndarray]]) -> None:
        for one, like in zip(made, expected, strict=True):
            assert len(one) == len(like) and all(map(np.array_equal, one, like))

    warm, made = started()
    assert warm == [{**dict.fromkeys(MADE, 0), "graphs loaded": graphs}] * 2
    assert_same(made)

    programs = [entry for entry in Store(cache).listed() if entry.kind == "program"]
    assert len(programs) == 2 * len(SIZES), "one of each rank for each size"
    assert Store(cache).remove("program", programs[0].name)
    without_one, made = started()
    assert [counts["captures"] for counts in without_one] == [1, 1], "what one rank misses all capture anew"
    assert [counts["graphs to inductor"] + counts["code generated"] for counts in without_one] == [0, 0]
    assert_same(made)
    again, made = started()
    assert again == warm
    assert_same(made)


@contextmanager
def counted() -> Iterator[Callable[[], tuple[int, int]]]:
    """Captures, and runs of passes, in this process since it was last asked."""
    with (
        mock.patch.object(compiler, "capture", wraps=compiler.capture) as captures,
        mock.patch.object(compiler, "run_passes", wraps=compiler.run_passes) as passes,
    ):

        def taken() -> tuple[int, int]:
            found = captures.call_count, passes.call_count
            captures.reset_mock()
            passes.reset_mock()
            return found

        yield taken


def as_it_is(module: nn.Module) -> dict[str, Any]:
    return {}


def other_processor(module: Any) -> dict[str, Any]:
    module.set_attn_processor(AttnProcessor())
    return {}


def other_attribute(module: nn.Module) -> dict[str, Any]:
    norm = next(each for each in module.modules() if isinstance(each, nn.LayerNorm))
    norm.eps = 0.5
    return {}


def other_flag(module: nn.Module) -> dict[str, Any]:
    return {"attention": "chunked"}


CHANGES = (as_it_is, other_processor, other_attribute, other_flag)


def call_changed(rank: int, folder: str, changes: tuple) -> list[tuple[tuple[int, int], str, np.ndarray, float]]:
    """For each change of a module: captures and passes, the class and values of a result, how far it is off."""
    found = []
    with counted() as taken:
        for change in changes:
            module = MODELS["pixart"].build()
            flags = change(module)
            args, kwargs = MODELS["pixart"].inputs()
            del kwargs["return_dict"]
            expected = module(*args, **kwargs).sample
            parallelize(module, Plan(backend="eager", cache=folder, **flags))
            result = module(*args, **kwargs)
            assert torch.equal(result["sample"], result.sample)
            off = float((result.sample - expected).abs().max() / expected.abs().max())
            found.append((taken(), type(result).__qualname__, result.sample.numpy(), off))
    return found


def test_only_the_same_call_of_the_same_module_is_found(tmp_path: Path) -> None:
    folder = str(tmp_path / "cache")
    ((made, kind, expected, off),) = procs.run(call_changed, 1, folder, (as_it_is,))[0]
    assert made[0] == 1 and made[1] > 0 and off <= TOLERANCE
    same, *changed = procs.run(call_changed, 1, folder, CHANGES)[0]
    assert same[:2] == ((0, 0), kind) and np.array_equal(same[2], expected)
    for change, (remade, its_kind, _, off) in zip(CHANGES[1:], changed, strict=True):
        assert remade == made, f"{change.__name__} is another program"
        assert its_kind == kind and off <= TOLERANCE
    assert all(each[0] == (0, 0) for each in procs.run(call_changed, 1, folder, CHANGES)[0])


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_nothing_is_written_where_nothing_is_to_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(variable: str, **plan: Any) -> list[Path]:
        """Every file in what could be the cache, after a call."""
        monkeypatch.setenv(VARIABLE, variable)
        module = parallelize(Doubled(), Plan(backend="eager", **plan))
        assert torch.equal(module(torch.ones(2, 3)), torch.full((2, 3), 2.0))
        return [path for path in tmp_path.rglob("*") if path.is_file()]

    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "cache"
    assert written(str(folder), cache=None) == []
    assert written("off") == []
    assert written("off", cache="auto") == []
    assert [path.parent.name for path in written(str(folder)) if path.parent != folder] == ["program"]
