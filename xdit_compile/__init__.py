"""A compiler for parallel diffusion inference: unmodified diffusers pipelines, split over devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import XditCompileError
from .plan import Plan
from .plan.requirements import check_requirements

if TYPE_CHECKING:
    from xdit_compile.distributed.devices import is_main_process, local_device

    from .api import explain, generation, parallelize, refresh, restore
    from .api.loading import from_pretrained

__version__ = "0.1.0"
__all__ = [
    "Plan",
    "XditCompileError",
    "explain",
    "from_pretrained",
    "generation",
    "is_main_process",
    "local_device",
    "parallelize",
    "refresh",
    "restore",
]


def __getattr__(name: str) -> Any:
    """Import the API, and with it torch, only when it is used: the command line checks its flags without it.

    Raises:
        UsageError: a library that it stands on is too old.
    """
    if name in __all__:
        check_requirements()
    if name in ("explain", "generation", "parallelize", "refresh", "restore"):
        from . import api

        return getattr(api, name)
    if name == "from_pretrained":
        from .api import loading

        return loading.from_pretrained
    if name in ("is_main_process", "local_device"):
        from .distributed import devices

        return getattr(devices, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
