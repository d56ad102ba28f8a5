"""Releases of libraries that are too old: refused in one line, before any of them is imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import commands
from packaging.requirements import Requirement

from xdit_compile.plan.requirements import OLDEST

ROOT = Path(__file__).resolve().parent.parent
EXPECTED = "diffusers 0.41.0 is too old for xdit_compile: pip install -U 'diffusers>=0.42'"


def test_the_oldest_releases_are_those_of_pyproject_and_diffusers_has_no_newest() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, lines)}
    for name, oldest in OLDEST.items():
        lowest = [each.version for each in ranges[name] if each.operator == ">="]
        assert lowest == [".".join(map(str, oldest))]
    assert ranges["diffusers"].contains("0.99")


def test_an_old_one_is_one_line_in_the_command_and_at_the_import(tmp_path: Path) -> None:
    (metadata := tmp_path / "path" / "diffusers-0.41.0.dist-info").mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.41.0\n")
    path = {"PYTHONPATH": str(metadata.parent)}
    assert EXPECTED in commands.one_error(commands.run("generate", cwd=tmp_path, **path), exit_code=2)
    code = (
        "import sys, xdit_compile\n"
        "try: xdit_compile.parallelize\n"
        "except xdit_compile.XditCompileError as error: print(error, 'torch' in sys.modules)"
    )
    environment = {**commands.clean_environment(), **path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"{EXPECTED} False"
