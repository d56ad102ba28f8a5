"""Which attention provider computes a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from xdit_compile.errors import ProviderUnavailable

from . import providers
from .providers import AttentionQuery, Provider

PROVIDERS = {
    provider.name: provider
    for provider in (
        providers.SDPA,
        providers.SDPA_MATH,
        providers.SDPA_FLASH,
        providers.SDPA_EFFICIENT,
        providers.SDPA_CUDNN,
        providers.FLASH_ATTN,
        providers.FLASH_ATTN_3,
        providers.FLASH_ATTN_4,
        providers.SAGE,
        providers.YUNCHANG,
        providers.CHUNKED,
    )
}

BEST_FIRST = (
    "sdpa", "flash_attn", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "yunchang", "flash_attn_3", "flash_attn_4",
    "sdpa_math", "chunked",
)  # fmt: skip
"""Those that are exact. FlashAttention 3 and 4 were never timed here, so that they stand behind those that were; as
``sdpa_flash`` takes all that they take, they are taken by name alone."""

_EXACTLY: ContextVar[bool] = ContextVar("attention by exact providers", default=False)


def inexact(name: str) -> str:
    """What the provider of that name rounds beyond the dtype of its operands; empty for one that is exact, or none."""
    return PROVIDERS[name].inexact if name in PROVIDERS else ""


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """While this lasts, the best exact provider computes in the place of one that is not.

    So the same compiled program is compared with the module to rounding, whatever computes its attention later.
    """
    before = _EXACTLY.set(True)
    try:
        yield
    finally:
        _EXACTLY.reset(before)


def choose(name: str, query: AttentionQuery) -> Provider:
    """The provider of that name, or for ``auto`` the best exact one that can answer the query.

    Where no log-sum-exp is needed ``sdpa`` stands first, since PyTorch picks among its own kernels there.

    Raises:
        ProviderUnavailable: for an unknown name, or one that cannot answer, with the reason.
    """
    if name == "auto":
        for candidate in BEST_FIRST:
            if PROVIDERS[candidate].unsupported(query) is None:
                return PROVIDERS[candidate]
        reasons = "; ".join(f"{other} {PROVIDERS[other].unsupported(query)}" for other in BEST_FIRST)
        raise ProviderUnavailable(f"no attention provider can compute this: {reasons}")
    if name not in PROVIDERS:
        raise ProviderUnavailable(f"attention {name!r} is unknown; choose auto or one of {', '.join(PROVIDERS)}")
    reason = PROVIDERS[name].unsupported(query)
    if reason:
        raise ProviderUnavailable(f"attention {name!r} {reason}")
    if PROVIDERS[name].inexact and _EXACTLY.get():
        return choose("auto", query)
    return PROVIDERS[name]
