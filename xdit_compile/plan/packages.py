"""Packages that may be installed, told from files alone: their versions, and which hold attention kernels."""

from __future__ import annotations

import importlib.metadata

ATTENTION_PACKAGES = {
    "flash_attn": ("flash_attn", "pip install flash-attn --no-build-isolation"),
    "flash_attn_3": (
        "flash_attn_interface",
        "python setup.py install, in hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    "flash_attn_4": ("flash_attn.cute", "pip install flash-attn-4"),
    "sage": ("sageattention", "pip install sageattention==2.2.0 --no-build-isolation"),
    "yunchang": ("yunchang", "pip install yunchang"),
}
"""Attention providers that come in a package of their own: what is imported, and the command that brings it."""


def version_of(name: str) -> str | None:
    """The version that a package says it has; None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
