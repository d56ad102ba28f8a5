"""What each distributed op does, said plainly over the tensors of all ranks: for meshes simulated in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from xdit_compile.kernels import collectives, ring  # noqa: F401 - they register the ops
from xdit_compile.kernels.attention import token_major
from xdit_compile.kernels.reference import attention_reference
from xdit_compile.kernels.row_exchange import RowExchange

ArgsPerRank = Sequence[tuple[Any, ...]]


def simulate(op: torch._ops.OpOverload, args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    """What each rank of one group gets from an op.

    Args:
        op: a key of ``SIMULATIONS``, such as ``torch.ops.xdit_compile.all_gather.default``.
        args_per_rank: the positional arguments of every rank of the group, in group order.

    Returns:
        Each rank's result, in new memory, laid out as the op itself does.

    Raises:
        KeyError: for an op that is no collective.
        ValueError: when the ranks' arguments do not fit together.
    """
    return SIMULATIONS[op](args_per_rank)


def _all_to_all(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    pieces = [x.split(list(in_splits)) for x, _, in_splits, _ in args_per_rank]
    results = []
    for rank, (_, out_splits, _, _) in enumerate(args_per_rank):
        arriving = [piece[rank] for piece in pieces]
        _agree("all_to_all splits", rank, list(out_splits), [len(piece) for piece in arriving])
        results.append(torch.cat(arriving))
    return results


def _all_gather(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    dim = _gathered_dim(args_per_rank)
    whole = torch.cat([args[0] for args in args_per_rank], dim)
    return [whole.clone(memory_format=torch.contiguous_format) for _ in args_per_rank]


def _gather_start(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    _gathered_dim(args_per_rank)
    room = max(math.prod(args[0].shape) for args in args_per_rank)
    shards = [args[0].reshape(-1) for args in args_per_rank]
    rooms = torch.cat([F.pad(shard, (0, room - len(shard))) for shard in shards])
    return [rooms.clone() for _ in args_per_rank]


def _gathered_dim(args_per_rank: ArgsPerRank) -> int:
    dim = args_per_rank[0][1]
    for rank, (_, _, sizes, _) in enumerate(args_per_rank):
        _agree("all_gather sizes", rank, list(sizes), [args[0].shape[dim] for args in args_per_rank])
    return dim


def _all_reduce(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    kinds = [args[2] if len(args) > 2 else "sum" for args in args_per_rank]
    for rank, (kind, (x, *_)) in enumerate(zip(kinds, args_per_rank, strict=True)):
        _agree("all_reduce", rank, (kind, x.shape), (kinds[0], args_per_rank[0][0].shape))
    stacked = torch.stack([args[0] for args in args_per_rank])
    result = stacked.sum(0, dtype=stacked.dtype) if kinds[0] == "sum" else stacked.amax(0)
    return [result.clone(memory_format=torch.contiguous_format) for _ in args_per_rank]


def _halo_exchange(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    whole = torch.cat([args[0] for args in args_per_rank], args_per_rank[0][1])
    results = []
    for rank, (_, dim, starts, stops, sizes, index, _) in enumerate(args_per_rank):
        _agree("halo_exchange sizes", rank, list(sizes), [args[0].shape[dim] for args in args_per_rank])
        _agree("halo_exchange index", rank, index, rank)
        _agree("halo_exchange rows", rank, (starts, stops), args_per_rank[0][2:4])
        rows = whole.narrow(dim, starts[rank], stops[rank] - starts[rank])
        results.append(rows.clone(memory_format=torch.contiguous_format))
    return results


def _halo_start(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    sent = [RowExchange.of(*rows).checked(x).packed(x) for x, *rows in args_per_rank]
    return _all_to_all([(*each, "") for each in sent])


def _ring_attention(args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    k = torch.cat([args[1] for args in args_per_rank], -2)
    v = torch.cat([args[2] for args in args_per_rank], -2)
    results = []
    for rank, (q, _, _, mask, lengths, scale, enable_gqa, _, _) in enumerate(args_per_rank):
        _agree("ring_attention lengths", rank, list(lengths), [args[1].shape[-2] for args in args_per_rank])
        out = attention_reference(q, k, v, mask, False, scale, enable_gqa)[0]
        results.append(token_major(out.to(q.dtype)))
    return results


def _agree(what: str, rank: int, said: object, actual: object) -> None:
    if said != actual:
        raise ValueError(f"{what} on rank {rank} of the group: it says {said} where the ranks have {actual}")


SIMULATIONS: dict[torch._ops.OpOverload, Callable[[ArgsPerRank], list[torch.Tensor]]] = {
    torch.ops.xdit_compile.all_to_all.default: _all_to_all,
    torch.ops.xdit_compile.all_gather.default: _all_gather,
    torch.ops.xdit_compile.gather_start.default: _gather_start,
    torch.ops.xdit_compile.all_reduce.default: _all_reduce,
    torch.ops.xdit_compile.halo_exchange.default: _halo_exchange,
    torch.ops.xdit_compile.halo_start.default: _halo_start,
    torch.ops.xdit_compile.ring_attention.default: _ring_attention,
}
