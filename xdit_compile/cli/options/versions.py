"""Which versions, devices and backends are here, told from files alone: nothing heavy is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from xdit_compile import __version__
from xdit_compile.plan.host import may_have_cuda
from xdit_compile.plan.packages import version_of

from .plenty import cpu_build
from .preflight import COMPILERS

PACKAGES = ("torch", "diffusers", "transformers", "triton")
CARDS = Path("/proc/driver/nvidia/gpus")


def print_version(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Answer ``--version``."""
    if wanted and not context.resilient_parsing:
        click.echo("\n".join([f"{context.info_name}, version {__version__}", *_lines()]))
        context.exit()


def _lines() -> Iterator[str]:
    versions = [f"{name} {version_of(name) or 'is missing'}" for name in PACKAGES]
    yield f"python {platform.python_version()}, {', '.join(versions)}"
    yield f"device: {device()}"
    there = dict(_backends())
    missing = [f"{name} ({why})" for name, why in there.items() if why]
    yield f"backends: {', '.join(name for name, why in there.items() if not why)}" + (
        f"; not here: {', '.join(missing)}" if missing else ""
    )


def device(cards: Path = CARDS) -> str:
    """What a run takes by default: cards by the names that the driver gives them, or the CPU."""
    cores = len(os.sched_getaffinity(0))
    cpu = f"CPU, {cores} core{'s' if cores > 1 else ''}"
    if not may_have_cuda():
        return cpu
    if cpu_build():
        return f"{cpu}; this PyTorch is built for the CPU, and there are cards"
    names = Counter(_names(cards))
    return ", ".join(f"{count} x {name}" for name, count in names.items()) or "cards that the driver does not name"


def _names(cards: Path) -> Iterator[str]:
    for file in sorted(cards.glob("*/information")):
        for line in file.read_text().splitlines():
            if line.startswith("Model:"):
                yield line.partition(":")[2].strip()


def _backends() -> Iterator[tuple[str, str]]:
    """Each backend, with a word on why it is not here."""
    yield "eager", ""
    on_card = may_have_cuda() and not cpu_build()
    if on_card:
        yield "inductor", "" if importlib.util.find_spec("triton") else "it needs triton"
    else:
        yield "inductor", "" if any(map(shutil.which, COMPILERS)) else "it needs a C++ compiler"
    yield "nexfort", "" if importlib.util.find_spec("nexfort") else "not installed"
