"""What was measured of the places that optional passes can rewrite: one table for each device, in a file of its own."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xdit_compile import __version__
from xdit_compile.cache.values import digest_of
from xdit_compile.errors import one_line

FORMAT = 1
"""Of a file; to be raised whenever its layout or what is measured changes."""
NOISE = 1.02
"""So many times as long a fused site may take before it is left apart."""
MOST_BYTES = 64 * 2**20
"""A larger file is none of ours."""
_KEY = re.compile(r"[0-9a-f]{8,128}")
logger = logging.getLogger("xdit_compile")


@dataclasses.dataclass(frozen=True)
class Timing:
    """What was measured of one site.

    Args:
        name: of the pass.
        site: its operators and operands, in words.
        apart, fused: median seconds of one call as the module has it, and as the pass makes it; None where that was
            not timed.
        error: the greatest difference of what the pass makes, of the greatest value; None where it did not run.
        rounds: samples that each median is of.
        date: when that was, as YYYY-MM-DD.
        wrong: why what the pass makes is never used; empty where it agrees.
        spread: how far the ratio of both may be off, by how samples differ.
    """

    name: str
    site: str
    apart: float | None
    fused: float | None
    error: float | None
    rounds: int
    date: str
    wrong: str = ""
    spread: float = 0.0

    @property
    def is_noise(self) -> bool:
        """Whether samples differ by more than apart and fused do, so that nothing was found out."""
        if self.apart is None or self.fused is None:
            return False
        return self.spread > NOISE - 1 and abs(self.fused / self.apart - 1) <= self.spread

    @property
    def refusal(self) -> str | None:
        """Why the site stays apart; None where it does not."""
        if self.wrong or self.apart is None or self.fused is None:
            return f"fused it was tried and is not used: {self.wrong or 'it was not timed'}"
        ratio = self.fused / self.apart
        return f"fused it timed {ratio:.2f} of apart" if ratio > NOISE else None


@dataclasses.dataclass(frozen=True)
class Timings:
    """Measured sites by their keys."""

    entries: Mapping[str, Timing] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """Of what is decided by it, so that measuring again with the same outcome changes nothing."""
        return digest_of(sorted([key, each.refusal is None] for key, each in self.entries.items()))

    def with_others(self, entries: Mapping[str, Timing]) -> Timings:
        """These and others, which count where a site is in both."""
        return Timings({**self.entries, **entries})


def described(device: torch.device, backend: str, mode: str) -> dict[str, Any]:
    """What timings hold for, in values of JSON.

    Args:
        device: where it computes.
        backend: the name of what compiles.
        mode: in which mode it does.
    """
    about: dict[str, Any] = {
        "kind": device.type, "backend": backend, "mode": mode, "torch": torch.__version__.split("\n")[0],
        "triton": _triton(), "xdit_compile": __version__,
    }  # fmt: skip
    if device.type == "cpu":
        return {**about, "name": _processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return {**about, "name": str(properties.name), "capability": [properties.major, properties.minor]}
    name = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return {**about, "name": str(name(device)) if name is not None and device.type != "cuda" else ""}


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _processor() -> str:
    """The processor's name and the instructions that PyTorch uses of it."""
    try:
        said = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        said = None
    name = said.group(1) if said else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def file_of(folder: Path, about: Mapping[str, Any]) -> Path:
    """Where the table of a device lies."""
    return folder / f"timings-{digest_of(dict(about))[:16]}.json"


def load(folder: Path | None, about: Mapping[str, Any]) -> Timings:
    """The table of a device; an empty one where there is none, or it is broken, which is told.

    Args:
        folder: the cache folder; None for none.
        about: what `described` says of the device.
    """
    if folder is None:
        return Timings()
    path = file_of(folder, about)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return Timings(_entries(json.loads(path.read_text()), about))
    except FileNotFoundError:
        return Timings()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("the table of timings %s is not used: %s", path, one_line(error) or type(error).__name__)
        return Timings()


def _entries(content: Any, about: Mapping[str, Any]) -> dict[str, Timing]:
    """The entries of a file.

    Raises:
        ValueError, KeyError, TypeError: it is no table, or another device's.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is no table of format {FORMAT}")
    if content["about"] != dict(about):
        raise ValueError("it is of another device")
    plain_entries = content["entries"]
    if not isinstance(plain_entries, dict):
        raise ValueError("its entries are none")
    entries = {key: Timing(**plain) for key, plain in plain_entries.items()}
    for key, timing in entries.items():
        if not _KEY.fullmatch(key) or not _is_sound(timing):
            raise ValueError(f"entry {key[:16]} is none")
    return entries


def _is_sound(timing: Timing) -> bool:
    """Whether fields have values that can be."""
    texts = all(isinstance(each, str) for each in (timing.name, timing.site, timing.date, timing.wrong))
    numbers = [each for each in (timing.apart, timing.fused) if each is not None]
    positive = all(type(each) in (int, float) and 0 < each < math.inf for each in numbers)
    spread = type(timing.spread) in (int, float) and 0 <= timing.spread < math.inf
    return texts and positive and spread and type(timing.rounds) is int and isinstance(timing.error, float | int | None)


def keep(folder: Path, about: Mapping[str, Any], entries: Mapping[str, Timing]) -> Path:
    """Write entries into the table of a device, beside what is there; processes that write at once wait.

    Args:
        folder: the cache folder, which is there.
        about: what `described` says of the device.

    Raises:
        OSError: it cannot be written.
    """
    from filelock import FileLock

    path = file_of(folder, about)
    with FileLock(path.with_suffix(".lock")):
        together = load(folder, about).with_others(entries).entries
        content = {
            "format": FORMAT,
            "about": dict(about),
            "entries": {key: dataclasses.asdict(each) for key, each in sorted(together.items())},
        }
        descriptor, draft = tempfile.mkstemp(dir=folder, prefix=".timings-")
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file, indent=1, allow_nan=False)
            os.replace(draft, path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    return path
