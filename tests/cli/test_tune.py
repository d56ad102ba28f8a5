"""``xdit-compile tune``: graphs of a model without weights, compiled, compared and timed in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TINY_PIPELINE, clean_environment, one_error, run

from xdit_compile.passes.fuse.timings import Timing
from xdit_compile.runtime.verify.timed import spread_of

MODEL = ("--model", str(TINY_PIPELINE))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--size", "wide"], "--size wide must be a height and a width in pixels"),
        (["--rounds", "1"], "1 is not in the range x>=3"),
        (["--no_cache"], "there is nowhere to keep timings: give --cache_dir, or leave out --no_cache"),
    ],
)
def test_a_wrong_request_is_one_line(flags: list[str], said: str, tmp_path: Path) -> None:
    assert said in one_error(run("tune", *flags, cwd=tmp_path), exit_code=2)


def tuned(cache: Path, *flags: str) -> str:
    done = run("tune", *MODEL, "--cache_dir", str(cache), "--rounds", "3", *flags, cwd=cache.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def told(cache: Path, *flags: str) -> str:
    """The line of joined linears in what ``explain`` says."""
    done = run("explain", *MODEL, "--cache_dir", str(cache), *flags, cwd=cache.parent)
    assert done.returncode == 0, done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("join_linears: "))


def check(cache: Path, *flags: str) -> None:
    """Time a model, see that what is found is in the table and used, and that it is not timed twice.

    What is lost in the noise of a busy machine is not in the table, and timed until it is found out.
    """
    for _ in range(20):
        printed = tuned(cache, *flags)
        if "not kept" not in printed:
            break
    (table,) = cache.glob("timings-*.json")
    entries = json.loads(table.read_text())["entries"].values()
    assert re.search(rf"^\d+ sites timed now, {len(entries)} in {re.escape(str(table))}$", printed, re.MULTILINE)
    assert len(entries) > 1 and all(each["name"] == "join_linears" and not each["wrong"] for each in entries)
    assert all(each["apart"] > 0 and each["fused"] > 0 and 0 <= each["error"] <= 2e-5 for each in entries)
    said = told(cache, *flags)
    assert (" by timing" in said or "fused it timed" in said) and "by estimate" not in said
    assert f"0 sites timed now, {len(entries)} in {table}" in tuned(cache, *flags).splitlines()


@pytest.mark.slow
def test_places_are_timed_once_and_what_came_out_is_used(tmp_path: Path) -> None:
    check(tmp_path / "cache", "--backend", "eager")
    assert "by estimate" in told(tmp_path / "cache", "--backend", "eager", "--height", "128")


@pytest.mark.slow
def test_compiled_code_is_timed(tmp_path: Path) -> None:
    check(tmp_path / "cache", "--backend", "inductor")


@pytest.mark.slow
def test_all_ranks_are_timed_in_one_process(tmp_path: Path) -> None:
    check(tmp_path / "cache", "--backend", "eager", "--ulysses_degree", "2")


def timing(apart: list[float], fused: list[float]) -> Timing:
    return Timing("join_linears", "", sorted(apart)[12], sorted(fused)[12], 0.0, 25, "", "", spread_of(apart, fused))


def test_slices_of_time_are_noise_and_what_is_clear_is_not() -> None:
    sliced = timing([1.0, 2.0, 2.0, 2.0, 2.0] * 5, [2.0, 1.0, 1.0, 1.0, 1.0] * 5)
    assert sliced.refusal is None and sliced.is_noise
    jitter = [1.0, 1.01, 1.02, 1.03, 1.3] * 5
    assert not timing(jitter, [0.9 * each for each in reversed(jitter)]).is_noise
    assert not timing(jitter, [1.2 * each for each in reversed(jitter)]).is_noise


@pytest.mark.slow
def test_times_that_are_slices_are_told_and_not_kept(tmp_path: Path) -> None:
    """Both programs of a place take 1 ms, or 2 ms where another process had the processor for the other one."""
    code = (
        "import itertools, sys; from xdit_compile.runtime.verify import timed\n"
        "made = itertools.count()\n"
        "class Sliced(timed._Calls):\n"
        "    def __init__(self, *arguments):\n"
        "        super().__init__(*arguments)\n"
        "        self._slices = itertools.cycle([1, 2, 2, 2, 2] if next(made) % 2 else [2, 1, 1, 1, 1])\n"
        "    def seconds(self, count):\n"
        "        return next(self._slices) * 1e-3\n"
        "timed._Calls = Sliced\n"
        "from xdit_compile.cli.main import entry; entry()"
    )
    flags = ["tune", *MODEL, "--backend", "eager", "--cache_dir", "kept", "--rounds", "10"]
    command = [sys.executable, "-P", "-c", code, *flags]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (count,) = re.findall(r"^(\d+) of \1 sites are not kept: fused/apart may be off by", done.stdout, re.MULTILINE)
    assert re.search(rf"^{count} sites timed now, 0 in ", done.stdout, re.MULTILINE)
    assert not list((tmp_path / "kept").glob("timings-*.json"))
