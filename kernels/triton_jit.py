"""Triton's decorator and language where it is installed; else a decorator that leaves a function as it is."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

TRITON = importlib.util.find_spec("triton") is not None
"""Whether kernels can be compiled; functions that are decorated without it are never called."""


def _as_it_is(function: Any) -> Any:
    return function


jit: Callable[[Any], Any] = importlib.import_module("triton").jit if TRITON else _as_it_is
tl: Any = importlib.import_module("triton.language") if TRITON else None
