"""Classes of diffusers that have no case, by the reason why."""

from __future__ import annotations

PIPELINES: dict[str, tuple[str, ...]] = {}
MODULES: dict[str, tuple[str, ...]] = {}
