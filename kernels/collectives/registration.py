"""One registration for each op that reaches other ranks: all that any part of the compiler asks of it stands there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

Args = tuple[Any, ...]
ArgsPerRank = Sequence[Args]
Simulate = Callable[[ArgsPerRank], list[torch.Tensor]]
Sent = Callable[[Args, int, int], int]
Finish = Callable[[torch.Tensor], torch.Tensor]
OnTheWire = Callable[[Args], tuple[Args, Finish]]
Function = TypeVar("Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("xdit_compile", "FRAGMENT")


@dataclasses.dataclass(frozen=True)
class Collective:
    """What is known of an op at which all ranks of a group meet.

    Args:
        simulate: each rank's result, in new memory and laid out as the op lays it out, from the positional arguments
            of every rank, in group order; raises ValueError where these do not fit together.
        sent: the elements that one rank sends to others, from its arguments (fakes will do), the ranks of the group,
            more than one, and its position among them.
        as_all_to_all: the arguments of the all-to-all as which the op goes over the wire, and what makes its result of
            what came; ranks may meet it with any other op that does. None for an op that meets its like alone.
    """

    op: torch._ops.OpOverload
    simulate: Simulate
    sent: Sent
    as_all_to_all: OnTheWire | None = None


_COLLECTIVES: dict[torch._ops.OpOverload, Collective] = {}
_ORDERED: list[torch._ops.OpOverload] = []


def register(
    schema: str, fake: Callable[..., Any], simulate: Simulate, sent: Sent, as_all_to_all: OnTheWire | None = None
) -> Callable[[Function], Function]:
    """Make a function the op of this schema, and a collective.

    Args:
        schema: as PyTorch writes them, without the namespace.
        fake: the result's shape and layout from the arguments of one rank.
        simulate, sent, as_all_to_all: see `Collective`.
    """

    def registered(function: Function) -> Function:
        op = _defined(schema, fake, function)
        _COLLECTIVES[op] = Collective(op, simulate, sent, as_all_to_all)
        return function

    return registered


def register_ordered(
    schema: str, fake: Callable[..., Any], tags: Sequence[torch.Tag] = ()
) -> Callable[[Function], Function]:
    """Make a function the op of this schema, which ranks run in the order of the graph though none waits there.

    Args:
        schema, fake: see `register`.
        tags: PyTorch's, beside the one that says that compilers may have the op.
    """

    def registered(function: Function) -> Function:
        _defined(schema, fake, function, tags)
        return function

    return registered


def collective(op: object) -> Collective | None:
    """What is known of an op, if it is a collective."""
    return _COLLECTIVES.get(op) if isinstance(op, torch._ops.OpOverload) else None


def ordered_ops() -> tuple[torch._ops.OpOverload, ...]:
    """Every registered op, collective or not: a compiler keeps all of them in the order of the graph."""
    return tuple(_ORDERED)


def _defined(
    schema: str, fake: Callable[..., Any], function: Callable[..., Any], tags: Sequence[torch.Tag] = ()
) -> torch._ops.OpOverload:
    """The op, which compilers run at every call and in the order of the graph.

    Ranks compile different graphs. Left free, inductor drops a collective whose result is empty on this rank only, and
    may order independent ones by sizes that differ between ranks; the peers then wait for ever. With inductor the order
    also takes ``inductor_order.pin_order``.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"xdit_compile::{name}", fake, lib=_LIBRARY)
    op: torch._ops.OpOverload = getattr(torch.ops.xdit_compile, name).default
    _register_effectful_op(op, _EffectType.ORDERED)
    _ORDERED.append(op)
    return op


def agree(what: str, rank: int, said: object, actual: object) -> None:
    """Check, in a simulation, that what a rank says of its group is so.

    Raises:
        ValueError: naming the rank and both.
    """
    if said != actual:
        raise ValueError(f"{what} on rank {rank} of the group: it says {said} where the ranks have {actual}")


def elements_sent(op: torch._ops.OpOverload, args: Args, group_size: int, index: int) -> int:
    """Elements that one rank sends to others in a collective.

    Args:
        op: a collective, such as ``torch.ops.xdit_compile.all_to_all.default``.
        args: its positional arguments on this rank; fakes will do.
        group_size: ranks of the group.
        index: this rank's position in the group.

    Raises:
        KeyError: for an op that is no collective.
    """
    return _COLLECTIVES[op].sent(args, group_size, index) if group_size > 1 else 0


def simulate(op: torch._ops.OpOverload, args_per_rank: ArgsPerRank) -> list[torch.Tensor]:
    """What each rank of one group gets from a collective, by its plain definition.

    Args:
        op: a collective, such as ``torch.ops.xdit_compile.all_gather.default``.
        args_per_rank: the positional arguments of every rank of the group, in group order.

    Raises:
        KeyError: for an op that is no collective.
        ValueError: when the ranks' arguments do not fit together.
    """
    return _COLLECTIVES[op].simulate(args_per_rank)
