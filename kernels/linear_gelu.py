"""A linear layer whose activation the product applies to what it has in registers, before it writes it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")
_LIBRARY.define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_LIBRARY, "linear_gelu", "CompositeImplicitAutograd")
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``gelu(x @ weight.T + bias)`` by its approximation with tanh, rounded once.

    On NVIDIA's cards that is the epilogue ``CUBLASLT_EPILOGUE_GELU_BIAS`` of cuBLASLt; elsewhere a product and a pass.

    Args:
        x: [..., in features].
        weight: [out features, in features], of the dtype of ``x``.
        bias: [out features], likewise.

    Returns:
        [..., out features].
    """
    if x.device.type != "cuda" or torch.version.hip is not None:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    rows = x.reshape(-1, x.shape[-1])
    found = torch.ops.aten._addmm_activation.default(bias, rows, weight.t(), use_gelu=True)
    return found.reshape(*x.shape[:-1], weight.shape[0])
