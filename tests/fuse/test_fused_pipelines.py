"""Whole pipelines with the passes for GPUs, on processes whose operators run on the CPU: two requests, then without."""

from __future__ import annotations

from typing import Any
from unittest import mock

import procs
import pytest
from zoo.pipelines import PIPELINES

import xdit_compile
from xdit_compile import Plan
from xdit_compile.passes.fuse import fusions
from xdit_compile.passes.fuse.fusions import OptionalPass

pytestmark = pytest.mark.slow
FOR_GPUS = tuple(each.name for each in fusions.IN_ORDER if each.kinds == ("cuda",))
METHODS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "ulysses": {"ulysses": 2},
    "ring": {"ring": 2},
    "tensor": {"tensor": 2},
    "pipefusion": {"pipefusion": 2, "warmup_steps": 1},
    "distrifusion": {"distrifusion": 2, "warmup_steps": 1},
}


def on_ranks(rank: int, name: str, plan: dict[str, Any]) -> list[float]:
    """How far requests with the passes are from the ones without, and how many lines of explain tell of them."""
    wanted = mock.patch.object(OptionalPass, "asked_for", lambda self, without, device: self.name not in without)
    results, told = [], 0
    for without in (FOR_GPUS, ()):
        pipe = PIPELINES[name].build()
        with wanted:
            xdit_compile.parallelize(pipe, Plan(**plan, without=without, timeout_s=60))
            results += [PIPELINES[name].call(pipe) for _ in range(2)]
            told = str(xdit_compile.explain(pipe)).count("norm_rope: ")
        xdit_compile.restore(pipe)
    size = results[0].abs().max()
    return [*(((each - results[0]).abs().max() / size).item() for each in results[1:]), float(told)]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_requests_are_the_same(name: str, method: str, backend: str, tmp_path: Any) -> None:
    if backend == "inductor" and (name, method) not in (("flux", "ulysses"), ("flux", "one rank")):
        pytest.skip("two plans are compiled")
    plan = {**METHODS[method], "backend": backend, "cache": str(tmp_path)}
    ranks = 1 if method == "one rank" else 2
    for again in range(1 + (backend == "inductor")):
        for *apart, told in procs.run(on_ranks, ranks, name, plan, timeout=400):
            assert max(apart) < 2e-5, again
            assert told == (method not in ("pipefusion",))
    if backend == "inductor":
        assert any((tmp_path / "program").iterdir())
