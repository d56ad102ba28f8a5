"""``xdit-compile tune``: graphs of a model without weights, compiled, compared and timed in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import TINY_PIPELINE, one_error, run

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
    """Time a model, see that what is found is in the table and used, and that it is not timed twice."""
    printed = tuned(cache, *flags)
    (table,) = cache.glob("timings-*.json")
    entries = json.loads(table.read_text())["entries"].values()
    assert f"{len(entries)} sites timed now, {len(entries)} in {table}" in printed.splitlines()
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
