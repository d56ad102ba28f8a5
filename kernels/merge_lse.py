"""Attention over parts of the keys, joined to attention over all of them by log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .reference import accumulation_dtype
from .triton_jit import TRITON, jit, tl

Part = tuple[torch.Tensor, torch.Tensor]
_TILE = 2048
"""Values that a program holds, unless one row has more."""


def merge(parts: Sequence[Part]) -> Part:
    """Join attention results over disjoint sets of keys, as in Ring Attention (arXiv:2310.01889).

    Args:
        parts: ``(out [..., S, D], lse [..., S])`` each; a row that saw no key has an ``lse`` of -inf and weight 0.

    Returns:
        ``(out, lse)`` over all keys, in fp32 (fp64 where the outputs are). A row that saw no key in any part is 0 with
        an ``lse`` of -inf.

    Raises:
        ValueError: without parts.
    """
    if not parts:
        raise ValueError("merge needs at least one part")
    (out, lse), *rest = parts
    exact = accumulation_dtype(out.dtype)
    held = out.to(exact, copy=True), lse.to(exact)
    for part in rest:
        held = merge_into(held, part)
    return held


def merge_into(held: Part, part: Part) -> Part:
    """Join attention over more keys to what there is: in one kernel on CUDA, else in as few as PyTorch takes.

    Args:
        held: in fp32 or fp64; its output is written to.
        part: over other keys. A row that saw no key is 0, here and in ``held``.
    """
    out, lse = held
    if TRITON and out.is_cuda and out.dim() == 4 and out.dtype == lse.dtype == torch.float32:
        return merge_by_kernel(held, part)
    share = torch.sub(part[1], lse).nan_to_num_(0.0).sigmoid_().to(out.dtype)
    return out.lerp_(part[0].to(out.dtype), share.unsqueeze(-1)), torch.logaddexp(lse, part[1])


@jit
def _merge_kernel(
    out, lse, part, part_lse, merged, rows, heads, tokens, out_batch, out_head, out_token, out_lane, part_batch,
    part_head, part_token, part_lane, WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program joins ``ROWS`` rows; log-sum-exps are contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    first, second = tl.load(lse + row, there, 0.0), tl.load(part_lse + row, there, 0.0).to(tl.float32)
    most = tl.maximum(first, second)
    never = most == float("-inf")
    most = tl.where(never, 0.0, most)
    weight, other = tl.exp(first - most), tl.exp(second - most)
    total = tl.where(never, 1.0, weight + other)
    tl.store(merged + row, tl.where(never, float("-inf"), most + tl.log(total)), there)
    share = (other / total)[:, None]
    token, head, sample = row % tokens, row // tokens % heads, row // tokens // heads
    lane = tl.arange(0, LANES)[None, :]
    inside = there[:, None] & (lane < WIDTH)
    place = out + (sample * out_batch + head * out_head + token * out_token)[:, None] + lane * out_lane
    source = part + (sample * part_batch + head * part_head + token * part_token)[:, None] + lane * part_lane
    held = tl.load(place, inside, 0.0)
    tl.store(place, held + share * (tl.load(source, inside, 0.0).to(tl.float32) - held), inside)


def merge_by_kernel(held: Part, part: Part) -> Part:
    """`merge_into` in one pass over the part and what there is, for outputs of four dims.

    Args:
        held: in fp32, ``out`` [batch, heads, S, D] of any strides, which is written to.
        part: of any floating dtype and strides.
    """
    (out, lse), (more, more_lse) = held, part
    batch, heads, tokens, width = out.shape
    lanes = 1 << (width - 1).bit_length()
    rows, count = max(1, _TILE // lanes), batch * heads * tokens
    merged = torch.empty_like(lse, memory_format=torch.contiguous_format)
    if count:
        _merge_kernel[(-(-count // rows),)](
            out, lse.contiguous(), more, more_lse.contiguous(), merged, count, heads, tokens, *out.stride(),
            *more.stride(), WIDTH=width, LANES=lanes, ROWS=rows,
        )  # fmt: skip
    return out, merged
