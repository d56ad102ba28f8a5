"""What kind of operator a node is, where the partitioner must know more than its loops: the lowerings go by these."""

from __future__ import annotations

import dataclasses

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
"""The operators that convolve, by their names."""


@dataclasses.dataclass(frozen=True)
class AttentionOp:
    """Scaled dot-product attention of queries, keys and values [..., heads, tokens, channels].

    Args:
        tokens: the dim of operands and result that holds tokens; channels are the next, the last.
        mask: the operand that is added to the scores, if any.
        scale: what scores are multiplied by; one over the root of the channels where it is None.
    """

    tokens: int
    mask: int | None
    is_causal: bool
    dropout_p: float
    scale: float | None
    enable_gqa: bool


@dataclasses.dataclass(frozen=True)
class ConvolutionOp:
    """A convolution of [batch, channels, space ...]; every tuple has one entry for each dim of space."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    depthwise: bool

    def reach(self, dim: int) -> int:
        """Rows of a dim of the operand from the first to the last that one row of the result reads; 2 is the first dim
        of space."""
        return self.dilation[dim - 2] * (self.kernel[dim - 2] - 1) + 1


@dataclasses.dataclass(frozen=True)
class NormOp:
    """A norm, and which operands its result is multiplied by and what is added to it."""

    weight: int | None
    bias: int | None


@dataclasses.dataclass(frozen=True)
class LinearOp:
    """A product of rows [..., in] and a weight [out, in]."""


Operator = AttentionOp | ConvolutionOp | NormOp | LinearOp
