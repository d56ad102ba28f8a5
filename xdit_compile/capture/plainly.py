"""Recording functions that batch others (``torch.vmap``), and flex attention, as the operators they come down to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch._functorch.apis as batching
import torch.nn.attention.flex_attention as flex
from torch import fx
from torch._higher_order_ops.flex_attention import math_attention
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode, make_fx
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

try:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
except ImportError:  # pragma: no cover - a private name, which may move
    from contextlib import nullcontext as TransformGetItemToIndex  # type: ignore[assignment]


@contextmanager
def stated_plainly(*modes: TorchDispatchMode) -> Iterator[None]:
    """Have what is recorded meanwhile hold neither ``torch.vmap`` nor flex attention.

    Args:
        modes: those, innermost last, that tensors are computed under while a function is batched.
    """
    own = batching.vmap_impl

    def batched(*args: Any, **kwargs: Any) -> Any:
        with patch.object(batching, "vmap_impl", own):
            return _recorded(own, modes, args, kwargs)

    with (
        patch.object(batching, "vmap_impl", batched),
        patch.object(flex, "flex_attention_hop", _attention),
        patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, create=True),
    ):
        yield


def _recorded(function: Callable[..., Any], modes: tuple[TorchDispatchMode, ...], args: Any, kwargs: Any) -> Any:
    """Trace a call below its batching, and run that trace, whose operators know nothing of it.

    Tensors that the function reaches beside its arguments are the trace's own attributes, the very ones.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [position for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    shape: list[pytree.TreeSpec] = []

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        traced_leaves = list(leaves)
        for position, tensor in zip(places, tensors, strict=True):
            traced_leaves[position] = tensor
        own_args, own_kwargs = pytree.tree_unflatten(traced_leaves, spec)
        outputs, result = pytree.tree_flatten(function(*own_args, **own_kwargs))
        shape.append(result)
        return outputs

    tensors = [leaves[position] for position in places]
    with _disable_current_modes(), _without_recording_functions(), ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        trace = make_fx(call, tracing_mode="real", _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False)(
            *tensors
        )
    return pytree.tree_unflatten(list(fx.Interpreter(trace).run(*tensors)), shape[-1])


@contextmanager
def _without_recording_functions() -> Iterator[None]:
    """Take off the modes that record calls of functions rather than of operators."""
    stack = _get_current_function_mode_stack()
    for _ in stack:
        _pop_mode()
    kept = [mode for mode in stack if not isinstance(mode, PreDispatchTorchFunctionMode)]
    for mode in kept:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in kept:
            _pop_mode()
        for mode in stack:
            _push_mode(mode)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., torch.Tensor],
    block_mask: tuple,
    scale: float,
    kernel_options: dict[str, Any],
    *buffers: Any,
) -> tuple[torch.Tensor | None, ...]:
    """What flex attention computes where it is not compiled: scores everywhere, and those that its mask leaves.

    Returns:
        the result, log-sum-exps and greatest scores; the latter two may be None where nobody asked for them.
    """
    asked = kernel_options.get("OUTPUT_LOGSUMEXP") or kernel_options.get("OUTPUT_MAX")
    if asked or score_mod is not flex._identity:
        return math_attention(query, key, value, score_mod, block_mask, scale, kernel_options, *buffers)
    batch, heads, length = query.shape[:3]
    key, value = (each.expand(batch, *each.shape[1:]) for each in (key, value))
    mask = _mask(block_mask[-1], (batch, heads, length, key.shape[2]), query.device)
    grouped = key.shape[1] != heads
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped), None, None


def _mask(allows: Callable[..., torch.Tensor], sizes: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """Which keys each query sees, by a function of batch, head, query and key; None where it sees all."""
    if allows is flex.noop_mask:
        return None
    places = [torch.arange(size, device=device) for size in sizes]
    with TransformGetItemToIndex():
        return flex._vmap_for_bhqkv(allows, prefix=())(*places)
