"""What a pipeline returned, made plain, and how far two of these lie apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import PIL.Image
import torch

TOLERANCE = 2e-5
LEVELS = 1
"""How many of 255 levels a rounded picture may differ by; its values before rounding are compared by `TOLERANCE`."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """An object, list or tuple: the name of its type and its parts by name or number."""

    kind: str
    parts: dict[str, Any]


def plain(value: Any) -> Any:
    """Tensors and pictures as arrays, containers as `Plain`; everything else as it is."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return value.float().numpy().copy() if value.is_floating_point() else value.numpy().copy()
    if isinstance(value, PIL.Image.Image):
        return np.asarray(value)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return Plain(type(value).__name__, {name: plain(part) for name, part in _fields(value).items()})
    if dataclasses.is_dataclass(value):
        return Plain(type(value).__name__, {name: plain(part) for name, part in vars(value).items()})
    if isinstance(value, list | tuple):
        return Plain(type(value).__name__, {str(at): plain(part) for at, part in enumerate(value)})
    return value


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    """An output object hides the fields that are None from its items."""
    return {**vars(value), **value} if dataclasses.is_dataclass(value) else dict(value)


@dataclasses.dataclass
class Difference:
    """``greatest`` relative difference of any float array, ``levels`` of any rounded one; ``other`` says what else."""

    greatest: float = 0.0
    levels: int = 0
    other: str = ""

    @property
    def exact(self) -> bool:
        """Whether nothing differs by more than `TOLERANCE`."""
        return self.within(TOLERANCE)

    def within(self, tolerance: float) -> bool:
        """Whether nothing differs by more than rounding."""
        return self.greatest <= tolerance and self.levels <= LEVELS and not self.other

    def __str__(self) -> str:
        return self.other or f"{self.greatest:.1e} of the greatest value, {self.levels} of 255 levels"


def compare(found: Any, expected: Any, into: Difference, path: str = "result") -> None:
    """Add to ``into`` how two plain values differ."""
    if isinstance(expected, Plain):
        _compare_parts(found, expected, into, path)
    elif isinstance(expected, np.ndarray):
        _compare_arrays(found, expected, into, path)
    elif type(found) is not type(expected) or not _equal(found, expected):
        into.other = into.other or f"{path} is {_named(found)}, not {_named(expected)}"


def _compare_parts(found: Any, expected: Plain, into: Difference, path: str) -> None:
    kinds = [(one.kind, list(one.parts)) if isinstance(one, Plain) else _named(one) for one in (found, expected)]
    if kinds[0] != kinds[1]:
        into.other = into.other or f"{path} is {kinds[0]}, not {kinds[1]}"
        return
    for name, part in expected.parts.items():
        compare(found.parts[name], part, into, f"{path}.{name}")


def _compare_arrays(found: Any, expected: np.ndarray, into: Difference, path: str) -> None:
    same = isinstance(found, np.ndarray) and found.shape == expected.shape and found.dtype == expected.dtype
    if not same:
        into.other = into.other or f"{path} is {_named(found)}, not {_named(expected)}"
    elif expected.dtype.kind == "f":
        scale = float(np.abs(expected).max(initial=0.0)) or 1.0
        far = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / scale
        into.greatest = max(into.greatest, far if np.isfinite(far) else np.inf)
    else:
        far = np.abs(found.astype(np.int64) - expected.astype(np.int64)).max(initial=0)
        into.levels = max(into.levels, int(far))


def _equal(found: Any, expected: Any) -> bool:
    simple = isinstance(expected, str | int | float | bool | type(None))
    return found == expected if simple else True


def _named(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {value.shape} of {value.dtype}"
    return value.kind if isinstance(value, Plain) else f"{type(value).__name__} {value!s:.40}"


def finite(value: Any) -> bool:
    """Whether every float array holds finite numbers."""
    if isinstance(value, Plain):
        return all(finite(part) for part in value.parts.values())
    return not (isinstance(value, np.ndarray) and value.dtype.kind == "f") or bool(np.isfinite(value).all())
