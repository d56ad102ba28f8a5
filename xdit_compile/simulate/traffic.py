"""How many elements of a distributed op leave a rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from xdit_compile.kernels import collectives, ring  # noqa: F401 - they register the ops
from xdit_compile.kernels.row_exchange import RowExchange


def elements_sent(op: torch._ops.OpOverload, args: tuple[Any, ...], group_size: int, index: int) -> int:
    """Elements that one rank sends to others.

    Args:
        op: a key of ``TRAFFIC``, such as ``torch.ops.xdit_compile.all_to_all.default``.
        args: its positional arguments on this rank; fakes will do.
        group_size: ranks of the group.
        index: this rank's position in the group.

    Returns:
        For all_to_all what goes to others; for all_gather the own shard times ``n - 1``; for all_reduce
        ``2 numel (n - 1) / n`` as in the ring algorithm, rounded down; for halo_exchange the rows that others ask for;
        for ring_attention the keys and values of each part that passes through, which is all but the next rank's.

    Raises:
        KeyError: for an op that is no collective.
    """
    return TRAFFIC[op](args, group_size, index) if group_size > 1 else 0


def _all_to_all(args: tuple[Any, ...], group_size: int, index: int) -> int:
    in_splits = args[2]
    return sum(in_splits) - in_splits[index]


def _all_gather(args: tuple[Any, ...], group_size: int, index: int) -> int:
    return math.prod(args[0].shape) * (group_size - 1)


def _all_reduce(args: tuple[Any, ...], group_size: int, index: int) -> int:
    return 2 * math.prod(args[0].shape) * (group_size - 1) // group_size


def _halo_exchange(args: tuple[Any, ...], group_size: int, index: int) -> int:
    x, dim, starts, stops, sizes, *_ = args
    return RowExchange.of(dim % x.dim(), starts, stops, sizes, index).elements_sent(x.shape)


def _ring_attention(args: tuple[Any, ...], group_size: int, index: int) -> int:
    _, k, v, _, lengths, *_ = args
    key = math.prod(k.shape[:-2]) * k.shape[-1] + math.prod(v.shape[:-2]) * v.shape[-1]
    return key * (sum(lengths) - lengths[(index + 1) % group_size])


TRAFFIC: dict[torch._ops.OpOverload, Callable[[tuple[Any, ...], int, int], int]] = {
    torch.ops.xdit_compile.all_to_all.default: _all_to_all,
    torch.ops.xdit_compile.all_gather.default: _all_gather,
    torch.ops.xdit_compile.gather_start.default: _all_gather,
    torch.ops.xdit_compile.all_reduce.default: _all_reduce,
    torch.ops.xdit_compile.halo_exchange.default: _halo_exchange,
    torch.ops.xdit_compile.halo_start.default: _halo_exchange,
    torch.ops.xdit_compile.ring_attention.default: _ring_attention,
}
