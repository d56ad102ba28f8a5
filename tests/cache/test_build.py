"""``xdit-compile build``: entries of all ranks from one process, which processes with weights start from."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import procs
import pytest
import torch
from zoo.transformers import MODELS

from xdit_compile import Plan, explain, parallelize
from xdit_compile.cache.store import Store
from xdit_compile.runtime.methods.ahead import build_ahead
from xdit_compile.runtime.stored.stored_call import StoredCall

FLAGS = ("--backend", "eager")


def command(*arguments: str, cache: Path) -> str:
    """What a command prints, in a process of its own."""
    environment = {**os.environ, "XDIT_COMPILE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "xdit_compile", *arguments, *FLAGS],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bad_requests_are_one_line(tmp_path: Path) -> None:
    for flags, said in (
        (["--size", "wide"], "--size wide must be a height and a width in pixels"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--target", "sm_70"], "--target sm_70 is unknown; choose one of sm_80, sm_89, sm_90, sm_100, sm_120"),
        (["--target", "sm_90", "--device", "cpu"], "leave out --device"),
        (["--no_cache"], "there is nowhere to keep graphs"),
        (["--also", "--ulysses_degree x"], "--also '--ulysses_degree x': Invalid value for '--ulysses_degree': 'x'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "xdit_compile", "build", *flags], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("degree", ["ulysses_degree", "tensor_parallel_degree", "pipefusion_parallel_degree"])
def test_ranks_with_weights_start_from_what_was_built(degree: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    built = command("build", f"--{degree}", "2", "--size", "192x256", cache=cache)
    assert "192 x 256 pixels, 1 prompt" in built and "2 new entries" in built
    picture = str(tmp_path / "out.png")
    run = ("generate", "--nproc", "2", f"--{degree}", "2", "--height", "192", "--width", "256", "--output", picture,
           "--overwrite")  # fmt: skip
    for _ in range(2):
        made = command(*run, "--num_inference_steps", "3", cache=cache)
        assert "from the cache" in made and "captured" not in made, made
    assert "2 of them there already" in command("build", f"--{degree}", "2", "--size", "192x256", cache=cache)


class Writes(torch.nn.Module):
    """Writes to a tensor in place, for which it is traced in another way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, 0] = 1.0
        return y + x


def test_a_module_that_writes_in_place_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    build_ahead(Writes().eval(), "module", (torch.ones(4, 4),), {}, Plan(backend="eager"), store, lambda rank: None)
    assert [each.kind for each in store.listed()] == ["program"]


def make_call(rank: int, folder: str) -> tuple[str, list[str], float]:
    """How the call came to be ready, warnings, and how far its result is off."""
    module = MODELS["pixart"].build()
    args, kwargs = MODELS["pixart"].inputs()
    kwargs["return_dict"] = True
    expected = module(*args, **kwargs).sample
    warned: list[str] = []
    with mock.patch.object(
        logging.getLogger("xdit_compile"), "warning", lambda text, *args: warned.append(text % args)
    ):
        parallelize(module, Plan(ulysses=2, backend="eager", cache=folder))
        result = module(*args, **kwargs).sample
    return explain(module).ready, warned, float((result - expected).abs().max() / expected.abs().max())


def test_a_built_entry_that_is_wrong_on_one_rank_is_made_anew_on_all(tmp_path: Path) -> None:
    store, device = Store(tmp_path / "cache"), torch.device("cpu")
    args, kwargs = MODELS["pixart"].inputs()
    kwargs["return_dict"] = True
    plan = Plan(ulysses=2, backend="eager")
    build_ahead(MODELS["pixart"].build(), "module", args, kwargs, plan, store, lambda rank: None)
    listed, _ = entries = [each for each in store.listed() if each.kind == "program"]
    assert len(entries) == 2
    entry = store.read(listed.kind, listed.name)
    assert entry is not None
    stored = StoredCall.unpacked(entry.body, device)
    called = [node for graph in stored.programs["call"].structures().values() for node in graph.graph.nodes]
    norms = [node for node in called if node.target is torch.ops.aten.layer_norm.default]
    assert norms
    for node in norms:
        node.args = (*node.args[:4], 0.5)
    store.write(entry.kind, entry.name, entry.about, stored.packed())

    for ready, warned, off in procs.run(make_call, 2, str(store.folder)):
        assert "captured anew" in ready and off <= 2e-5
        assert any("is wrong and made anew" in text for text in warned), warned
    for ready, warned, off in procs.run(make_call, 2, str(store.folder)):
        assert "from the cache" in ready and off <= 2e-5 and not warned
