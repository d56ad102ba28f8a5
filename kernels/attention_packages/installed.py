"""Whether a package is there, in which version, and on which card a call runs; looked up once."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
import sys
from types import ModuleType

import torch

from xdit_compile.errors import ProviderUnavailable, one_line


@functools.cache
def is_there(module: str) -> bool:
    """Whether a package can be imported; every attention of a call asks.

    A folder without ``__init__.py`` is none: flash-attn-4 alone leaves such a ``flash_attn``, with ``flash_attn.cute``
    in it. The package above a module is not imported, which may load libraries for seconds.
    """
    parent, _, _ = module.rpartition(".")
    above = importlib.util.find_spec(parent or module)
    if not parent or above is None:
        return above is not None and above.origin is not None
    where = above.submodule_search_locations
    specs = [finder.find_spec(module, where) for finder in sys.meta_path] if where is not None else []
    return any(spec is not None and spec.origin is not None for spec in specs)


@functools.cache
def version_of(package: str) -> tuple[int, ...] | None:
    """Its version, numbers alone; None where it does not say."""
    try:
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))))
    except importlib.metadata.PackageNotFoundError:
        return None


def capability_of(card: int | None) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA card by its number, the current one by default; None where there is none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(card)


def imported(provider: str, module: str) -> ModuleType:
    """A package that is there.

    Raises:
        ProviderUnavailable: it cannot be loaded, as one that was built for another PyTorch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise ProviderUnavailable(f"attention {provider!r}: {module} cannot be loaded: {one_line(error)}") from error
