"""What an attention call asks for, and the reasons for which a kernel is out of reach of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch

from .installed import capability_of, is_there, version_of

HALF = (torch.float16, torch.bfloat16)
Capability = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class AttentionQuery:
    """What an attention call needs, in terms that a provider can refuse.

    Args:
        device: device type, ``cpu`` or ``cuda``.
        dtype: of q, k and v.
        heads, kv_heads: query heads and key heads; they differ for grouped queries.
        q_tokens, k_tokens: sequence lengths.
        head_dim, v_head_dim: of q and k, and of v.
        mask: kind of mask.
        is_causal: whether each query sees only keys up to its own position.
        lse: whether the log-sum-exp is needed, as ring attention does.
        card: number of the device among those of its type; the current one where None.
        capability: compute capability of the card; it is asked where None.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    q_tokens: int
    k_tokens: int
    head_dim: int
    v_head_dim: int
    mask: Literal["none", "bool", "additive"] = "none"
    is_causal: bool = False
    lse: bool = False
    card: int | None = None
    capability: Capability | None = None

    def computes_with(self) -> Capability | None:
        """Compute capability of the card that it runs on; None where that is none of NVIDIA's."""
        return self.capability or capability_of(self.card)


Refusal = Callable[[AttentionQuery], str | None]
"""Gives the reason why a query is out of reach, or None."""


def runs_on(*devices: str) -> Refusal:
    """Needs a device of one of these types."""

    def refusal(query: AttentionQuery) -> str | None:
        return None if query.device in devices else f"runs on {' or '.join(devices)}, not on {query.device}"

    return refusal


def needs_card(*capabilities: Capability) -> Refusal:
    """Was built for cards of these compute capabilities."""

    def refusal(query: AttentionQuery) -> str | None:
        here = query.computes_with()
        if here in capabilities:
            return None
        names = [f"sm_{major}{minor}" for major, minor in capabilities]
        wanted = " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        return f"needs a card of {wanted}, " + (f"this is sm_{here[0]}{here[1]}" if here else "and there is none here")

    return refusal


def cuda_takes(dtypes: tuple[torch.dtype, ...]) -> Refusal:
    """Takes these dtypes on CUDA."""

    def refusal(query: AttentionQuery) -> str | None:
        if query.device != "cuda" or query.dtype in dtypes:
            return None
        return f"takes {', '.join(_name(dtype) for dtype in dtypes)} on cuda, not {_name(query.dtype)}"

    return refusal


def installed(module: str, command: str) -> Refusal:
    """Needs a module that can be had by a command."""

    def refusal(query: AttentionQuery) -> str | None:
        return None if is_there(module) else f"is not installed ({module}); run: {command}"

    return refusal


def at_least(package: str, oldest: tuple[int, ...], why: str) -> Refusal:
    """Needs a package of a version or a later one."""

    def refusal(query: AttentionQuery) -> str | None:
        version = version_of(package)
        if version is None or version >= oldest:
            return None
        here, wanted = (".".join(map(str, numbers)) for numbers in (version, oldest))
        return f"needs {package} {wanted} or later, this is {here}: {why}"

    return refusal


def head_dim_up_to(limit: int) -> Refusal:
    """Takes heads of at most so many channels on CUDA."""

    def refusal(query: AttentionQuery) -> str | None:
        widest = max(query.head_dim, query.v_head_dim)
        return f"takes head dims up to {limit}, not {widest}" if query.device == "cuda" and widest > limit else None

    return refusal


def head_dim_of_card(limit: int, *capabilities: Capability) -> Refusal:
    """The same on cards of these compute capabilities alone."""

    def refusal(query: AttentionQuery) -> str | None:
        reason = head_dim_up_to(limit)(query)
        here = query.computes_with() if reason else None
        return f"{reason}, on sm_{here[0]}{here[1]}" if here and here in capabilities else None

    return refusal


def head_dim_multiple_of(step: int) -> Refusal:
    """Takes heads of a multiple of so many channels."""

    def refusal(query: AttentionQuery) -> str | None:
        if query.head_dim % step == 0 and query.v_head_dim % step == 0:
            return None
        return f"needs head dims that are multiples of {step}, not {query.head_dim} and {query.v_head_dim}"

    return refusal


def floating(query: AttentionQuery) -> str | None:
    """Takes floating point tensors alone."""
    return None if query.dtype.is_floating_point else f"takes floating point tensors, not {_name(query.dtype)}"


def no_lse(query: AttentionQuery) -> str | None:
    """Gives no log-sum-exp."""
    return "returns no log-sum-exp, which ring attention needs; choose sdpa_flash or auto" if query.lse else None


def no_mask(query: AttentionQuery) -> str | None:
    """Takes no mask on any device."""
    return "takes no mask; choose auto" if query.mask != "none" else None


def no_mask_on_cuda(query: AttentionQuery) -> str | None:
    """Takes no mask on CUDA."""
    return no_mask(query) if query.device == "cuda" else None


def equal_head_dims(query: AttentionQuery) -> str | None:
    """Takes values as wide as keys alone."""
    if query.head_dim == query.v_head_dim:
        return None
    return f"needs equal head dims of keys and values, not {query.head_dim} and {query.v_head_dim}"


def square_causal(query: AttentionQuery) -> str | None:
    """Has a causal mask for as many queries as keys alone."""
    if query.is_causal and query.q_tokens != query.k_tokens:
        return "aligns a causal mask at the end, which differs where queries and keys differ in number; choose auto"
    return None


def square_causal_on_cuda(query: AttentionQuery) -> str | None:
    """The same on CUDA alone."""
    return square_causal(query) if query.device == "cuda" else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
