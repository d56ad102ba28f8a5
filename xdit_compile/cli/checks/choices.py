"""Which backends and attention providers can be used here, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterator

from .finding import MISSING, OK, Finding

HEADS, TOKENS, WIDTH = 24, 4096, 128
"""Of the attention that providers are asked about: as an image model of the present has it."""
_COMMAND = "; run: "


def backends() -> Iterator[Finding]:
    """Every backend; one that cannot be used says what to do in its reason."""
    from xdit_compile.backends.registry import backends as known
    from xdit_compile.backends.registry import find_backend

    auto = find_backend("auto").name
    for name, backend in known().items():
        why_not = backend.unavailable()
        if why_not is None:
            yield Finding(name, OK, "taken by auto" if name == auto else "can be used")
        else:
            reason, _, remedy = why_not.rpartition("; ")
            yield Finding(name, MISSING, reason, remedy)


def attention() -> Iterator[Finding]:
    """Every attention provider, asked for one typical attention on this device."""
    import torch

    from xdit_compile.kernels.providers import AttentionQuery
    from xdit_compile.kernels.registry import PROVIDERS, choose

    kind = torch.accelerator.current_accelerator(check_available=True)
    device = "cpu" if kind is None else kind.type
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    query = AttentionQuery(device, dtype, HEADS, HEADS, TOKENS, TOKENS, WIDTH, WIDTH)
    auto = choose("auto", query).name
    for name, provider in PROVIDERS.items():
        why_not = provider.unsupported(query)
        if why_not is None:
            said = "taken by auto" if name == auto else "can be used"
            yield Finding(name, OK, f"{said}; not exact: {provider.inexact}" if provider.inexact else said)
        else:
            reason, _, command = why_not.partition(_COMMAND)
            yield Finding(name, MISSING, reason, command or f"--attention {auto} does the same here")
