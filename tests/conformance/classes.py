"""All pipelines, denoisers and autoencoders of diffusers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import diffusers.models
import diffusers.pipelines

FAMILIES = ("transformers", "unets", "controlnets", "autoencoders")
"""The packages of diffusers' models that denoise, steer or code."""


def pipelines() -> set[str]:
    """The names of all classes of pipelines that can be imported."""
    return set(_classes(diffusers.pipelines, diffusers.DiffusionPipeline))


def networks() -> set[str]:
    """The names of all classes of denoisers, control nets and autoencoders."""
    packages = [importlib.import_module(f"diffusers.models.{family}") for family in FAMILIES]
    return {name for package in packages for name in _classes(package, diffusers.ModelMixin)}


def _classes(package: ModuleType, base: type) -> Iterator[str]:
    """The subclasses that modules of a package define; modules whose requirements are missing define none."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        try:
            module = importlib.import_module(found.name)
        except (ImportError, RuntimeError):
            continue
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__:
                yield value.__name__
