"""``xdit-compile build``: entries of all ranks from one process, which processes with weights start from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        (["--no_cache"], "there is nowhere to keep graphs"),
        (["--also", "--ulysses_degree x"], "'x' is not a valid integer"),
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
    run = ("generate", "--nproc", "2", f"--{degree}", "2", "--height", "192", "--width", "256", "--output", picture)
    for _ in range(2):
        made = command(*run, "--num_inference_steps", "3", cache=cache)
        assert "from the cache" in made and "captured" not in made, made
    assert "2 of them there already" in command("build", f"--{degree}", "2", "--size", "192x256", cache=cache)
