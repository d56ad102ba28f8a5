"""`xdit-compile doctor`: what it looks at, what it says of what is wrong, and its exit code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import commands
import pytest

from xdit_compile.cli.checks import devices, running, storage
from xdit_compile.cli.checks.finding import MISSING, OK, WARN
from xdit_compile.cli.main import main

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tSYS\t0-47\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
"""
"""As nvidia-smi 5xx writes it, of three cards of which two are linked."""


def test_all_that_is_looked_at_in_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--no_run", "--json", "--cache_dir", "kept"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True and commands.files(tmp_path) == set()
    found = {finding["name"]: finding for findings in report["checks"].values() for finding in findings}
    names = ("python", "torch", "diffusers", "transformers", "nexfort", "C++", "computes on", "gloo", "nccl", "network")
    for name in (*names, "inductor", "sdpa", "folder", "shared memory", "memory", "torch build"):
        assert found[name]["state"] in (OK, WARN, MISSING) and found[name]["said"]
    assert "requires torch<=2.5.1" in report["checks"]["backends"][1]["said"]
    silent = [one["name"] for one in found.values() if one["state"] != OK and not one["remedy"]]
    assert set(silent) <= {"nexfort"}
    assert "a small graph" not in report["checks"] and str(tmp_path / "kept") in found["folder"]["said"]


def test_what_is_too_old_or_broken_is_told_and_the_exit_code_is_1(tmp_path: Path) -> None:
    """An older diffusers that stands before the real one, and a compiler that is not there."""
    (old := tmp_path / "path" / "diffusers-0.30.0.dist-info").mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.30.0\n")
    wrong = {"PYTHONPATH": str(old.parent), "CXX": str(tmp_path / "no-such-compiler")}
    done = commands.run("doctor", "--no_run", cwd=tmp_path, **wrong)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert re.search(r" missing diffusers 0\.30\.0 is too old; .*>=0\.42.* is required -> pip install 'diffusers", said)
    assert re.search(r" missing C\+\+ .*no-such-compiler is not there -> install g\+\+", said)
    last = done.stderr.strip().splitlines()[-1]
    assert last == "xdit-compile: error: what is required is missing: diffusers, C++; what to do stands beside each"
    assert not any(line.endswith(" ") for line in done.stdout.splitlines())


@pytest.mark.slow
def test_a_small_graph_and_two_processes_and_no_silence(tmp_path: Path) -> None:
    done = commands.run("doctor", cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ok +inductor +a small graph on \w+ in", done.stdout, re.M)
    assert re.search(r"^ok +two processes +joined over [\w:,]+ and added up a number", done.stdout, re.M)
    assert "doctor: compiling a small graph with inductor ... " in done.stderr
    assert commands.files(tmp_path) == set()


def test_help_and_wrong_flags_import_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--no_run", "--json", "--cache_dir"))
    assert main(["doctor", "--nproc", "2"]) == 2


def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).wait()"
    assert running._ended([sys.executable, "-c", script], 1.0) == ("", "it did not end within 1 s")
    assert running._ended([sys.executable, "-c", "raise ValueError('no port')"], 20.0) == ("", "ValueError: no port")


def test_links_of_cards_are_read() -> None:
    assert devices.links_in(TOPOLOGY) == {("GPU0", "GPU1"): "NV18", ("GPU0", "GPU2"): "SYS", ("GPU1", "GPU2"): "SYS"}
    assert devices.links_in("") == {}


def test_the_network_that_gloo_takes() -> None:
    assert devices.addresses_by_interface()["lo"] == "127.0.0.1"
    assert devices.interface({"GLOO_SOCKET_IFNAME": "lo"}).said == "lo (GLOO_SOCKET_IFNAME)"
    wrong = devices.interface({"GLOO_SOCKET_IFNAME": "nowhere0"})
    assert wrong.state == WARN and "there is no nowhere0" in wrong.said and "lo" in wrong.remedy
    assert devices.interface({}).state in (OK, WARN)


def test_a_cache_that_is_off_or_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDIT_COMPILE_CACHE", "off")
    (off,) = storage.cache()
    assert off.state == WARN and "every run compiles anew" in off.said
    (folder := tmp_path / "shared").mkdir()
    folder.chmod(0o777)
    found = {finding.name: finding for finding in storage.cache(str(folder))}
    assert found["privacy"].state == WARN and f"chmod 700 {folder}" in found["privacy"].remedy
