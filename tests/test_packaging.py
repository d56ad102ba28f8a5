"""What pip builds: every module, the embedded pipeline, and a command that works away from the repository."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("xdit_compile", "passes", "kernels", "backends")
LIMIT = 24_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of what git would clone."""
    tree = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "dist", "."]
    subprocess.run(command, cwd=tree, check=True, timeout=300)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_every_module_ships(wheel: Path):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"xdit_compile/{'' if folder == 'xdit_compile' else folder + '/'}{path.relative_to(ROOT / folder)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }
    assert len(expected) > 150
    assert {"xdit_compile/evaluation/checker.py", "xdit_compile/passes/rules/registry.py"} <= expected
    assert expected - shipped == set()


def test_the_embedded_pipeline_ships_whole_and_small(wheel: Path):
    folder = ROOT / "xdit_compile" / "cli" / "demo_pipeline"
    expected = {f"xdit_compile/cli/demo_pipeline/{f.relative_to(folder)}" for f in folder.rglob("*") if f.is_file()}
    assert "xdit_compile/cli/demo_pipeline/model_index.json" in expected
    assert expected <= set(zipfile.ZipFile(wheel).namelist())
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < LIMIT
    assert all(f.stat().st_mode & 0o444 == 0o444 for f in folder.rglob("*"))


def test_the_features_ship_small_and_readable(wheel: Path):
    weights = ROOT / "xdit_compile" / "evaluation" / "features.safetensors"
    assert "xdit_compile/evaluation/features.safetensors" in zipfile.ZipFile(wheel).namelist()
    assert weights.stat().st_size < 500_000
    assert weights.stat().st_mode & 0o444 == 0o444


def test_only_the_package_is_at_the_top(wheel: Path):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"xdit_compile"}


def test_the_installed_wheel_works_from_anywhere(wheel: Path, tmp_path: Path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    code = (
        "import xdit_compile.kernels.registry, xdit_compile.passes, xdit_compile.backends;"
        "import xdit_compile.cli.options.request as r;"
        "print(xdit_compile.__file__, r.find_model(None))"
    )
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(target / "xdit_compile" / "__init__.py"),
        str(target / "xdit_compile" / "cli" / "demo_pipeline"),
    ]


def test_constraints_pin_every_dependency_within_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==(\S+)", line).groups()
            pins[canonicalize_name(name)] = version
    extras = project["optional-dependencies"]
    pinned = itertools.chain(*(extras[name] for name in ("evaluate", "train", "test", "dev")))
    wanted = [Requirement(text) for text in [*project["dependencies"], *pinned]]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name != "xdit-compile":
            assert requirement.specifier.contains(pins[name]), f"{requirement} and {name}=={pins[name]}"
    assert set(extras) >= {"flash-attn", "onediff", "yunchang", "distvae", "evaluate", "train", "test", "dev"}
