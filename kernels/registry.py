"""Which attention provider computes a call."""

from __future__ import annotations

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
        providers.YUNCHANG,
        providers.CHUNKED,
    )
}

BEST_FIRST = ("sdpa", "flash_attn", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "yunchang", "sdpa_math", "chunked")


def choose(name: str, query: AttentionQuery) -> Provider:
    """The provider of that name, or for ``auto`` the best that can answer the query.

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
    return PROVIDERS[name]
