"""The benchmarks run, at sizes too small to measure anything."""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
LARGEST_DIFFERENCE = 2e-5


def run(script: str, *options: str, tmp_path: pathlib.Path) -> dict:
    """What a benchmark writes as JSON."""
    out = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / script), *options, "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
def test_sequence_parallel_compares_every_contender_before_it_times_them(tmp_path: pathlib.Path) -> None:
    sizes = ["--hidden", "32", "--head_dim", "16", "--blocks", "2", "--tokens", "16", "--text", "4"]
    found = run("sequence_parallel.py", "--backend", "eager", "--rounds", "2", *sizes, tmp_path=tmp_path)
    contenders = {entry["name"]: entry for entry in found["contenders"]}
    for name in ("one process, eager", "ulysses 2, eager", "ring 2, eager", "diffusers ulysses 2, eager"):
        entry = contenders[name]
        assert entry["failure"] is None and len(entry["wall_s"]) == 2 and entry["ratio"] > 0
        assert entry["difference"] <= LARGEST_DIFFERENCE
    for name in ("ulysses 2, eager, collectives stubbed", "ring 2, eager, collectives stubbed"):
        assert contenders[name]["failure"] is None and contenders[name]["median_s"] > 0
    assert contenders["one process, eager"]["ratio"] == 1


@pytest.mark.slow
def test_host_compares_results_before_it_times_parts(tmp_path: pathlib.Path) -> None:
    found = run("host.py", "--model", "FLUX", "--backend", "eager", "--rounds", "2", tmp_path=tmp_path)
    for world, entries in found["models"]["FLUX"].items():
        module, ours, *theirs = entries
        assert ours["reads"] == 0 and len(ours["parts"]["signature"]) == 2
        assert len(theirs) == int(world) - 1
        for entry in (module, ours, *theirs):
            assert not entry["failure"] and entry["difference"] <= LARGEST_DIFFERENCE and len(entry["host_ms"]) == 2


@pytest.mark.slow
def test_guidance_compares_both_kinds_with_one_process(tmp_path: pathlib.Path) -> None:
    sizes = ["--hidden", "64", "--blocks", "2", "--tokens", "16"]
    found = run("guidance.py", "--backend", "eager", "--rounds", "2", *sizes, tmp_path=tmp_path)
    assert len(found["contenders"]) == 5
    for entry in found["contenders"]:
        assert entry["failure"] is None and len(entry["wall_s"]) == 2 and entry["ratio"] > 0
        assert entry["difference"] is None or entry["difference"] <= LARGEST_DIFFERENCE


@pytest.mark.slow
def test_parameters_of_every_rank_are_counted(tmp_path: pathlib.Path) -> None:
    found = run("tensor_memory.py", "--degree", "2", "--degree", "8", tmp_path=tmp_path)
    assert len(found["held"]) == 4
    for held in found["held"]:
        assert 1.0 <= held["ratio"] <= (1.10 if "FLUX" in held["model"] else 1.15)


@pytest.mark.slow
def test_loading_counts_what_every_rank_holds(tmp_path: pathlib.Path) -> None:
    found = run("loading.py", "--gigabytes", "0.1", "--degree", "2", tmp_path=tmp_path)
    alone, *ranks = found["loaded"]
    assert len(ranks) == 2 and all(rank["share"] < 0.55 * alone["share"] for rank in ranks)


@pytest.mark.slow
def test_capture_counts_what_it_made(tmp_path: pathlib.Path) -> None:
    found = run("capture.py", "--double", "3", "--single", "3", "--rounds", "1", tmp_path=tmp_path)
    (one,) = found["rounds"]
    assert all(seconds > 0 for seconds in one["seconds"].values())
    assert one["counts"]["collectives"] == 2 * 6 + 1
    assert one["counts"]["captured nodes, each structure once"] < one["counts"]["captured nodes, every call"]


@pytest.mark.slow
def test_graphs_for_a_card_are_built_once_and_found_again(tmp_path: pathlib.Path) -> None:
    found = run("target_build.py", "--small", "--ulysses", "2", tmp_path=tmp_path)
    first, second = found["ranks"]
    assert first["structures"] > 0 and first["kernels"] > 0 and second["structures"] == 0 < second["programs"]
    assert found["loaded"]["found"] > 0 and found["loaded"]["compiled"] == 0


@pytest.mark.slow
def test_passes_for_gpus_round_less_than_graphs_without_them(tmp_path: pathlib.Path) -> None:
    found = run("bf16_error.py", "--model", "FLUX", "--model", "HunyuanVideo", "--seeds", "10", tmp_path=tmp_path)
    for seeds in found["found"].values():
        errors = [each["errors"] for each in seeds]
        for name in ("all passes", "all but norm_rope"):
            assert statistics.median(each[name] / each["no passes"] for each in errors) < 0.997


def test_stubs_are_taken_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from contenders import Stubs

    real = dist.all_to_all_single
    x, out = torch.arange(4.0), torch.empty(4)
    with pytest.raises(KeyError), Stubs().installed() as stubs:
        dist.all_to_all_single(out, x, [2, 2], [2, 2])
        assert stubs.calls == 1 and torch.equal(out, x)
        raise KeyError
    assert dist.all_to_all_single is real


def test_stubs_stand_for_sends_and_receives_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from contenders import Stubs

    before = (dist.isend, distributed_c10d.irecv)
    with Stubs().installed():
        for op in (dist.isend, dist.irecv):
            assert dist.P2POp.__new__(dist.P2POp, op, torch.empty(3)) is not None
    assert (dist.isend, distributed_c10d.irecv) == before


@pytest.mark.slow
def test_a_pipeline_computes_what_one_process_does_before_it_is_timed(tmp_path: pathlib.Path) -> None:
    sizes = ["--hidden", "64", "--blocks", "4", "--tokens", "64"]
    timeline = tmp_path / "timeline.png"
    found = run(
        "pipefusion.py", "--backend", "eager", "--rounds", "2", *sizes, "--timeline", str(timeline), tmp_path=tmp_path
    )
    for entry in found["contenders"]:
        assert entry["failure"] is None and entry["ratio"] > 0
        assert entry["difference"] is None or entry["difference"] <= LARGEST_DIFFERENCE
    assert timeline.stat().st_size > 1000


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_equal_stages_hardly_wait(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import schedule

    for patches in (stages, stages + 1, 2 * stages):
        assert schedule.idle_share(schedule.simulate(stages, patches, 20)) < 0.10
    assert schedule.idle_share(schedule.simulate(stages, 1, 20)) > 0.4, "one patch at a time keeps one stage busy"


def test_evaluations_of_stale_methods_become_a_table_and_a_curve(tmp_path: pathlib.Path) -> None:
    interval = {"value": 0.5, "low": 0.25, "high": 0.75}
    for steps in (1, 4):
        report = {
            "settings": {"plan": {"distrifusion": 2, "pipefusion": 1, "patches": None, "warmup_steps": steps}},
            "distances": {"pairs": 64, "psnr": {**interval, "value": 30.0 + steps}, "ssim": interval},
            "following": {"one thing": {"right": dict.fromkeys(("reference", "plan", "difference"), interval)}},
            "pairs": [{"largest": each * steps} for each in (9, 2, 5)],
        }
        (tmp_path / str(steps)).mkdir()
        (tmp_path / str(steps) / "report.json").write_text(json.dumps(report))
    command = [sys.executable, str(BENCHMARKS / "stale_pictures.py"), *(str(tmp_path / name) for name in ("4", "1"))]
    done = subprocess.run(
        [*command, "--curve", str(tmp_path / "curve.png")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    quality, greatest = (table.splitlines() for table in done.stdout.split("\n\n"))
    rows = quality[2:]
    assert [row.split(" | ")[1:4] for row in rows] == [
        ["1", "64", "31.0 (0.2 to 0.8)"],
        ["4", "64", "34.0 (0.2 to 0.8)"],
    ]
    assert all(row.startswith("| DistriFusion, 2 ranks | ") and "50.0 (25.0 to 75.0)" in row for row in rows)
    assert [row.split(" | ")[3:6] for row in greatest[2:]] == [["2", "5", "9"], ["8", "20", "36"]]
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.slow
def test_startup_counts_nothing_made_in_warm_runs(tmp_path: pathlib.Path) -> None:
    (found,) = run("startup.py", "--plans", "cfg 2", "--repeats", "1", "--steps", "2", tmp_path=tmp_path)["plans"]
    (cold,), (warm,) = found["cold"], found["warm"]
    assert found["difference"] == 0 and found["cold_s"] > found["warm_s"] > 0
    for before, after in zip(cold["counts"], warm["counts"], strict=True):
        assert before["captures"] and before["passes"] and after["graphs loaded"]
        assert not any(count for name, count in after.items() if name != "graphs loaded")


@pytest.mark.slow
def test_cold_start_compares_results_before_it_tells(tmp_path: pathlib.Path) -> None:
    options = ("--blocks", "1", "--single_blocks", "1", "--repeats", "1", "--degrees", "2")
    found = run("cold_start.py", *options, tmp_path=tmp_path)
    assert {"parallelize", "compile_repeated_blocks", "torch.compile"} == found["starts"].keys()
    for (start,) in found["starts"].values():
        assert start["difference"] <= LARGEST_DIFFERENCE and start["total_s"] >= start["compile_s"] > 0
    assert found["starts"]["parallelize"][0]["capture_s"] > 0
    assert found["alone_cpu_s"]["2"][0] > 0 and found["together_cpu_s"]["2"][0] > 0
