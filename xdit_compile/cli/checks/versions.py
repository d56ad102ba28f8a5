"""Which packages are installed, in which versions, beside what this one requires. Imports none of them."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from xdit_compile import __version__
from xdit_compile.plan.packages import version_of

from .finding import MISSING, OK, WARN, Finding

OURS = "xdit-compile"
OLDEST_PYTHON = (3, 11)
OPTIONAL = {
    "triton": "kernels on GPUs; it comes with torch for CUDA",
    "onediff": "backend nexfort",
    "nexfort": "backend nexfort",
    "flash-attn": "attention flash_attn",
    "yunchang": "attention yunchang",
    "distvae": "--vae_provider distvae",
    "torchmetrics": "evaluate",
    "scipy": "evaluate",
}
"""Packages that something works without, and what they are for."""
EXTRAS = {
    "onediff": "onediff", "flash-attn": "flash-attn", "yunchang": "yunchang", "distvae": "distvae",
    "torchmetrics": "evaluate", "scipy": "evaluate",
}  # fmt: skip
"""The extra of this package that brings one."""


def versions() -> Iterator[Finding]:
    """Python, this package, all that it requires, and what it can use besides."""
    here = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("python", MISSING, f"{here}, and {wanted} is the oldest", f"make env PYTHON=python{wanted}", True)
    else:
        yield Finding("python", OK, f"{here} ({sys.executable})")
    yield Finding(OURS, OK, f"{__version__} ({Path(__file__).parents[2]})")
    ranges = _ranges()
    for name, wanted_range in ranges.items():
        if name not in OPTIONAL:
            yield _required(name, wanted_range)
    yield _build_of_torch()
    for name, purpose in OPTIONAL.items():
        yield _optional(name, purpose, ranges.get(name))


def _ranges() -> dict[str, SpecifierSet]:
    """What this package requires, by its installed metadata, of extras only what `OPTIONAL` names; nothing where it
    is not installed."""
    try:
        lines = importlib.metadata.requires(OURS) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    ranges = {}
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if "extra" not in str(requirement.marker or "") or requirement.name in OPTIONAL:
            ranges[requirement.name] = requirement.specifier
    return ranges


def _required(name: str, wanted: SpecifierSet) -> Finding:
    version = version_of(name)
    remedy = f"pip install '{name}{wanted}'"
    if version is None:
        return Finding(name, MISSING, f"not installed; {wanted} is required", remedy, True)
    if wanted.contains(version, prereleases=True):
        return Finding(name, OK, version)
    below = any(each.operator in (">=", ">", "~=") and not each.contains(version, prereleases=True) for each in wanted)
    if below:
        return Finding(name, MISSING, f"{version} is too old; {wanted} is required", remedy, True)
    return Finding(name, WARN, f"{version} is newer than what was tried ({wanted})", f"if something fails: {remedy}")


def _optional(name: str, purpose: str, wanted: SpecifierSet | None) -> Finding:
    version = version_of(name)
    if version is None:
        remedy = f"pip install '{OURS}[{EXTRAS[name]}]'" if name in EXTRAS else ""
        return Finding(name, MISSING, f"not installed; for {purpose}", remedy)
    if wanted is not None and not wanted.contains(version, prereleases=True):
        return Finding(name, WARN, f"{version}, and {wanted} was tried; for {purpose}", f"pip install '{name}{wanted}'")
    return Finding(name, OK, f"{version}, for {purpose}")


def _build_of_torch() -> Finding:
    """What torch was built for, as its version.py says."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    try:
        tree = ast.parse(Path(folders[0], "version.py").read_text())
    except (IndexError, OSError, SyntaxError):
        return Finding("torch build", MISSING, "torch has no version.py", "install torch again", True)
    said = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Constant):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                said[ast.unparse(target)] = str(node.value.value or "")
    built_for = [f"{kind.upper()} {said[kind]}" for kind in ("cuda", "hip", "xpu") if said.get(kind)]
    return Finding("torch build", OK, f"for {' and '.join(built_for)}" if built_for else "for the CPU alone")
