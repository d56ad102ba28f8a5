"""Attention over keys and values that travel around a ring of ranks (Ring Attention, arXiv:2310.01889)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from .attention import attended, attention, check_mask, empty_output, output_shape, query_of, token_major
from .collectives.process_groups import answering, carrier, process_group
from .collectives.registration import Args, ArgsPerRank, agree, register
from .merge_lse import Part, merge_into
from .reference import accumulation_dtype, attention_reference
from .registry import choose

_ABSORBED = -(2.0**27)
_LARGE = -1024.0


def _fake(q, k, v, mask, lengths, scale, enable_gqa, group, provider):
    _check(q, k, v, mask, lengths, enable_gqa)
    return empty_output(q, output_shape(q, k, v, None, enable_gqa))


def _simulated(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    k = torch.cat([args[1] for args in args_per_rank], -2)
    v = torch.cat([args[2] for args in args_per_rank], -2)
    results = []
    for rank, (q, _, _, mask, lengths, scale, enable_gqa, _, _) in enumerate(args_per_rank):
        agree("ring_attention lengths", rank, list(lengths), [args[1].shape[-2] for args in args_per_rank])
        out = attention_reference(q, k, v, mask, False, scale, enable_gqa)[0]
        results.append(token_major(out.to(q.dtype)))
    return results


def _sent(args: Args, group_size: int, index: int) -> int:
    """The keys and values of each part that passes through, which is all but the next rank's."""
    _, k, v, _, lengths, *_ = args
    row = math.prod(k.shape[:-2]) * k.shape[-1] + math.prod(v.shape[:-2]) * v.shape[-1]
    return int(row * (sum(lengths) - lengths[(index + 1) % group_size]))


@register(
    "ring_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, SymInt[] lengths, float? scale, bool enable_gqa, "
    "str group, str provider) -> Tensor",
    _fake,
    _simulated,
    _sent,
)
def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: list[int],
    scale: float | None,
    enable_gqa: bool,
    group: str,
    provider: str,
) -> torch.Tensor:
    """Attention of this rank's queries over the keys of all ranks, equal to attention over their concatenation.

    Keys and values are packed in one buffer, once: it goes to the next rank while the part at hand is computed, and is
    passed on as it came. Partial results are merged by log-sum-exp in fp32.

    Args:
        q: this rank's queries ``[..., Hq, Sq, D]``; zero queries or heads are legal.
        k: this rank's keys ``[..., Hkv, lengths[position], D]``; zero keys are legal.
        v: this rank's values ``[..., Hkv, lengths[position], Dv]``.
        mask: bool or additive, its last dim 1 or ``sum(lengths)`` with the columns in ring order, its other dims
            broadcastable to ``[..., Hq, Sq]``.
        lengths: keys of each rank in ring order.
        scale: of the scores, ``1 / sqrt(D)`` by default.
        enable_gqa: ``Hq`` is a multiple of ``Hkv``.
        group: process group of the ring; empty for this rank alone.
        provider: a provider that returns the log-sum-exp, or ``auto``.

    Returns:
        ``[..., Hq, Sq, Dv]`` in the dtype of ``q``, with tokens before heads in memory.

    Raises:
        ValueError: when shapes do not fit ``lengths``.
        ProviderUnavailable: when the provider cannot compute this.
        AgreementError: when a peer fails or does not answer in time.
    """
    _check(q, k, v, mask, lengths, enable_gqa)
    if not group:
        return attention(q, k, v, mask, False, scale, enable_gqa, provider)
    members = process_group(group)
    position, count = _place(members, k, lengths)
    choose(provider, query_of(q, k, v, mask, lse=True))
    if count == 1:
        return attention(q, k, v, mask, False, scale, enable_gqa, provider)
    q, mask = absorbed(q, mask)
    columns, likes, device = _columns(mask, lengths), (k, v), k.device
    packed = _packed(k, v, carrier(device, members))
    held: Part | None = None
    for step in range(count):
        here = (position - step) % count
        finish = _pass_on(packed, _elements(likes, lengths[here - 1]), members) if step + 1 < count else None
        held = _joined(held, *attended(q, k, v, columns[here], False, scale, enable_gqa, provider, lse=True))
        if finish is not None:
            packed = finish()
            k, v = _unpacked(packed.to(device), likes, lengths[here - 1])
    assert held is not None
    return token_major(held[0].to(q.dtype))


def _place(members: dist.ProcessGroup, k: torch.Tensor, lengths: list[int]) -> tuple[int, int]:
    """This rank's position in the ring, and how many ranks there are."""
    position, count = dist.get_rank(members), dist.get_world_size(members)
    if count != len(lengths) or k.shape[-2] != lengths[position]:
        raise ValueError(
            f"ring position {position} of {count} holds {k.shape[-2]} keys where the ranks have {list(lengths)}"
        )
    return position, count


def absorbed(q: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same attention with rows of the mask shifted to where a log-sum-exp keeps its digits.

    A row whose every entry is a large negative number (the least finite one, say, for padding) would give each part a
    log-sum-exp in which the number of its keys is lost to rounding. Softmax ignores a shift of a row, so its greatest
    entry is taken off; and where that was so large that it swallowed the scores, the queries become 0.
    """
    if mask is None or mask.dtype == torch.bool or mask.shape[-1] == 0:
        return q, mask
    top = mask.amax(-1, keepdim=True)
    large = (top < _LARGE) & (top > -math.inf)
    return torch.where(large & (top < _ABSORBED), 0, q).to(q.dtype), mask - torch.where(large, top, 0)


def _columns(mask: torch.Tensor | None, lengths: list[int]) -> list[torch.Tensor | None]:
    """The mask of each part."""
    if mask is None or mask.shape[-1] != sum(lengths):
        return [mask] * len(lengths)
    return list(mask.split(list(lengths), -1))


def _joined(held: Part | None, out: torch.Tensor, lse: torch.Tensor | None) -> Part:
    """What there is, with one more part: the first as it is, others into it."""
    assert lse is not None
    exact = accumulation_dtype(out.dtype)
    return (out.to(exact), lse.to(exact)) if held is None else merge_into(held, (out, lse))


def _packed(k: torch.Tensor, v: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Keys and values in one piece of memory, flat."""
    flat = k.new_empty(k.numel() + v.numel(), device=place)
    for piece, x in zip(flat.split([k.numel(), v.numel()]), (k, v), strict=True):
        piece.view(x.shape).copy_(x)
    return flat


def _unpacked(
    packed: torch.Tensor, likes: tuple[torch.Tensor, torch.Tensor], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as they lie in what another rank packed; ``length`` is how many keys it has."""
    shapes = [(*x.shape[:-2], length, x.shape[-1]) for x in likes]
    k, v = packed.split([math.prod(shape) for shape in shapes])
    return k.view(shapes[0]), v.view(shapes[1])


def _elements(likes: tuple[torch.Tensor, torch.Tensor], length: int) -> int:
    return sum(math.prod(x.shape[:-2]) * length * x.shape[-1] for x in likes)


def _pass_on(packed: torch.Tensor, coming: int, members: dist.ProcessGroup) -> Callable[[], torch.Tensor]:
    """Start sending keys and values to the next rank and receiving those of the one before; the result waits for them.

    Parts without keys are not sent: both sides know the lengths.
    """
    buffer = packed.new_empty(coming)
    position, count = dist.get_rank(members), dist.get_world_size(members)
    operations = []
    if packed.numel():
        to = dist.get_global_rank(members, (position + 1) % count)
        operations.append(dist.P2POp(dist.isend, packed, to, members))
    if coming:
        source = dist.get_global_rank(members, (position - 1) % count)
        operations.append(dist.P2POp(dist.irecv, buffer, source, members))
    with answering(members, "ring attention"):
        works = dist.batch_isend_irecv(operations) if operations else []

    def finish() -> torch.Tensor:
        with answering(members, "ring attention"):
            for work in works:
                work.wait()
        return buffer

    return finish


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: list[int],
    enable_gqa: bool,
) -> None:
    *heads, queries, _ = output_shape(q, k, v, None, enable_gqa)
    if k.shape[-2] not in lengths:
        raise ValueError(f"ring attention with {k.shape[-2]} keys here where the ranks have {list(lengths)}")
    if mask is not None:
        check_mask(mask, (*heads, queries, sum(lengths)))
