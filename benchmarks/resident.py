"""The memory of this process as the kernel counts it (Linux)."""

from __future__ import annotations

import ctypes
import pathlib
import re

STATUS = pathlib.Path("/proc/self/status")
CLEAR = pathlib.Path("/proc/self/clear_refs")
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Environment in which tensors are given back to the kernel when they end, and no part of the heap stays behind."""


def give_back() -> None:
    """Give free parts of the heap back to the kernel."""
    ctypes.CDLL(None).malloc_trim(0)


def count_anew() -> None:
    """Forget the greatest number of bytes so far."""
    CLEAR.write_text("5")


def resident() -> int:
    """Bytes in memory now."""
    return _read("VmRSS")


def greatest_resident() -> int:
    """The greatest number of bytes in memory since `count_anew`."""
    return _read("VmHWM")


def _read(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024
