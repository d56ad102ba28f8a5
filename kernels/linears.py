"""Linear layers that write less to memory: with the activation behind them, and of values that come in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from .reference import accumulation_dtype

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
for _schema in (
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "linear_of_parts(Tensor[] parts, Tensor weight, Tensor? bias) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_LIBRARY, "linear_gelu", "CompositeImplicitAutograd")
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``gelu(x @ weight.T + bias)`` by its approximation with tanh, rounded once.

    On NVIDIA's cards that is the epilogue ``CUBLASLT_EPILOGUE_GELU_BIAS`` of cuBLASLt; elsewhere a product and a pass,
    in float32 (float64 where ``x`` is).

    Args:
        x: [..., in features].
        weight: [out features, in features], of the dtype of ``x``.
        bias: [out features], likewise.

    Returns:
        [..., out features].
    """
    if x.device.type != "cuda" or torch.version.hip is not None:
        exact = accumulation_dtype(x.dtype)
        sums = F.linear(x.to(exact), weight.to(exact), bias.to(exact))
        return F.gelu(sums, approximate="tanh").to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    found = torch.ops.aten._addmm_activation.default(bias, rows, weight.t(), use_gelu=True)
    return found.reshape(*x.shape[:-1], weight.shape[0])


@torch.library.impl(_LIBRARY, "linear_of_parts", "CompositeExplicitAutograd")
def linear_of_parts(parts: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``cat(parts, -1) @ weight.T + bias``, as a sum of products of the parts.

    In half precision the sum of those before is rounded once for each further part; the narrowest comes first, so that
    what is rounded early is small.

    Args:
        parts: one or more of [..., features], equal in all dims but the last.
        weight: [out features, features of all parts together].
        bias: [out features], or none.

    Returns:
        [..., out features].

    Raises:
        ValueError: when the weight takes other features than the parts have together.
    """
    widths = [part.shape[-1] for part in parts]
    if sum(widths) != weight.shape[1]:
        raise ValueError(f"parts of {widths} features for a weight that takes {weight.shape[1]}")
    order = sorted(range(len(parts)), key=widths.__getitem__)
    columns = weight.split(widths, 1)
    rows = [part.reshape(-1, width) for part, width in zip(parts, widths, strict=True)]
    total = F.linear(rows[order[0]], columns[order[0]], bias)
    for index in order[1:]:
        total.addmm_(rows[index], columns[index].t())
    return total.reshape(*parts[0].shape[:-1], weight.shape[0])


@torch.library.register_fake("xdit_compile::linear_of_parts", lib=_LIBRARY)
def _(parts: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return parts[0].new_empty(*parts[0].shape[:-1], weight.shape[0])
