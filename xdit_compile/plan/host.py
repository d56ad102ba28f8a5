"""What this machine has, as its kernel and driver say: memory and NVIDIA's cards. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

NVIDIA = ("nvidia[0-9]*", "nvhost-gpu", "nvgpu", "dxg", "kfd")
"""Device files without which PyTorch finds no device that it calls CUDA: of NVIDIA's cards, Tegra, WSL, and AMD's."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
GROUPS = Path("/sys/fs/cgroup")
_V1_UNLIMITED = 2**60


def available_memory(ranks: int = 1) -> int | None:
    """Bytes of RAM that a process here may still take; None where nobody says.

    That is what the kernel calls available or what a container's limit leaves, whichever is less, shared by ``ranks``.
    """
    known = [bytes_ for bytes_ in (_available(), *_left_in_groups()) if bytes_ is not None]
    return min(known) // max(ranks, 1) if known else None


def _available(file: Path = Path("/proc/meminfo")) -> int | None:
    try:
        said = re.search(r"^MemAvailable:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(said[1]) * 1024 if said else None


def _left_in_groups(root: Path = GROUPS, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the limits of this process's control groups leave: of its own, and of those above."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return []
    left = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            top, limit, usage, reclaimed = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            reclaimed = "total_inactive_file"
        else:
            continue
        inner = top / path.lstrip("/")
        for group in dict.fromkeys([*(each for each in (inner, *inner.parents) if each.is_relative_to(top)), top]):
            room = _left(group, limit, usage, reclaimed)
            left += [] if room is None else [room]
    return left


def _left(group: Path, limit: str, usage: str, reclaimed: str) -> int | None:
    """What one group may still take: its limit less what is used, of which files that were read can be dropped."""
    most, used = _number(group / limit), _number(group / usage)
    if most is None or used is None or most >= _V1_UNLIMITED:
        return None
    try:
        said = re.search(rf"^{reclaimed} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        said = None
    return max(most - used + (int(said[1]) if said else 0), 0)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def may_have_cuda(devices: Path = Path("/dev")) -> bool:
    """Whether PyTorch could find a device that it calls CUDA: False where there is surely none."""
    return any(next(devices.glob(pattern), None) is not None for pattern in NVIDIA)


def visible_cards(devices: Path = Path("/dev"), environment: Mapping[str, str] = os.environ) -> int | None:
    """How many of NVIDIA's cards a process sees; None where these alone do not say."""
    cards = len([file for file in devices.glob("nvidia[0-9]*") if file.name.removeprefix("nvidia").isdigit()])
    if not cards:
        return None
    if environment.get(VISIBLE) is None:
        return cards
    entries = [entry.strip() for entry in environment[VISIBLE].split(",") if entry.strip()]
    if not all(entry.isdigit() for entry in entries):
        return None
    return next((place for place, entry in enumerate(entries) if int(entry) >= cards), len(entries))


def free_on_cards(environment: Mapping[str, str] = os.environ) -> list[int]:
    """Free bytes of each of NVIDIA's cards that a process sees, as the driver says; empty where it does not.

    No card is touched: a process that asks PyTorch holds a part of one from then on.
    """
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in said.splitlines() if line.count(",") == 2]
    if not all(free.isdigit() for _, _, free in rows):
        return []
    free_of = {name: int(free) * 2**20 for index, uuid, free in rows for name in (index, uuid)}
    shown = environment.get(VISIBLE)
    names = [index for index, _, _ in rows] if shown is None else [entry.strip() for entry in shown.split(",")]
    return [free_of[name] for name in names if name in free_of]
