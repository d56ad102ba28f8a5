"""Runs the programs of all ranks of a simulated mesh in one process, each rank as far as its next collective."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from xdit_compile.capture.interpret import assemble, bind
from xdit_compile.distributed.mesh import is_simulated, simulated_members
from xdit_compile.errors import AgreementError, PartitionError
from xdit_compile.ir.arguments import function_of
from xdit_compile.ir.program import Program
from xdit_compile.kernels.collectives.registration import collective, simulate
from xdit_compile.weights.weights import Weights

ALL_TO_ALL = torch.ops.xdit_compile.all_to_all.default
"""What some collectives are on the wire: ranks meet there by any of these."""
Said = tuple[Any, tuple[Any, ...]]
Step = tuple[Any, tuple[Any, ...], str, Said]
"""An op that ranks meet at, its arguments, its group, and what stands for it in the graph."""


@torch.no_grad()
def run_simulated(
    programs: Sequence[Program],
    module: nn.Module,
    args: tuple,
    kwargs: dict,
    observe: Callable[[int, Any, tuple[Any, ...]], None] | None = None,
    kept: Sequence[Mapping[str | int, torch.Tensor]] | None = None,
) -> list[Any]:
    """Each rank's result of a call, collectives computed by their plain definitions.

    Args:
        programs: the local program of every rank, partitioned on a simulated mesh.
        module: holds the weights.
        observe: told of every collective: the rank, the op and its arguments.
        kept: for every rank what its program takes beside the call's own arguments; see `bind`.

    Raises:
        AgreementError: when ranks do not meet at the same collectives.
    """
    leaves, weights = pytree.tree_leaves((args, kwargs)), Weights(module)
    own = kept or [{}] * len(programs)
    given = [bind(program, weights, leaves, each) for program, each in zip(programs, own, strict=True)]
    found = run_ranks(programs, given, observe)
    return [assemble(program, tensors).result for program, tensors in zip(programs, found, strict=True)]


@torch.no_grad()
def run_ranks(
    programs: Sequence[Program],
    inputs: Sequence[Sequence[torch.Tensor]],
    observe: Callable[[int, Any, tuple[Any, ...]], None] | None = None,
) -> list[tuple[torch.Tensor, ...]]:
    """What the root graph of every rank's program gives for its inputs.

    Raises:
        AgreementError: when ranks do not meet at the same collectives.
    """
    ranks = [_steps(program.root, given) for program, given in zip(programs, inputs, strict=True)]
    waiting: dict[int, Step] = {}
    results: dict[int, tuple] = {}
    for rank in range(len(ranks)):
        _advance(rank, ranks[rank], None, waiting, results)
    while waiting:
        ready = _ready(waiting)
        if ready is None:
            raise AgreementError(f"ranks wait for one another: {[(r, str(s[0]), s[2]) for r, s in waiting.items()]}")
        steps = [waiting.pop(rank) for rank in ready]
        for rank, (_, _, _, said) in zip(ready, steps, strict=True):
            if observe is not None:
                observe(rank, *said)
        outputs = simulate(steps[0][0], [step[1] for step in steps])
        for rank, output in zip(ready, outputs, strict=True):
            _advance(rank, ranks[rank], output, waiting, results)
    return [results[rank] for rank in range(len(programs))]


def _ready(waiting: dict[int, Step]) -> list[int] | None:
    """The members of a group that all wait at the same collective."""
    for target, _, group, _ in waiting.values():
        members = simulated_members(group)
        if all(rank in waiting and waiting[rank][2] == group and waiting[rank][0] is target for rank in members):
            return members
    return None


def _advance(
    rank: int, steps: Generator[Step, Any, tuple], value: Any, waiting: dict[int, Step], results: dict[int, tuple]
) -> None:
    try:
        waiting[rank] = steps.send(value)
    except StopIteration as finished:
        results[rank] = finished.value


def _steps(module: fx.GraphModule, inputs: Sequence[Any]) -> Generator[Step, Any, tuple]:
    """Interpret a graph; yield every collective and go on with what is sent back."""
    env: dict[fx.Node, Any] = {}
    remaining_inputs = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(remaining_inputs)
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "get_attr":
            env[node] = getattr(module, str(node.target))
        elif node.op == "call_module":
            env[node] = yield from _steps(getattr(module, str(node.target)), args)
        elif node.op == "output":
            return args[0]
        elif (met := collective(node.target)) is not None and (group := _group(args)) is not None:
            if met.as_all_to_all is None:
                env[node] = yield met.op, args, group, (met.op, args)
            else:
                wired, finish = met.as_all_to_all(args)
                env[node] = finish((yield ALL_TO_ALL, wired, group, (met.op, args)))
        else:
            env[node] = _called(node, args, kwargs)
        _check_shape(node, env.get(node))
    raise AssertionError("a graph without output")


def _called(node: fx.Node, args: Any, kwargs: Any) -> Any:
    try:
        return function_of(node)(*args, **kwargs)
    except Exception as error:
        name = node.meta.get("shape", (node.name,))[0]
        raise PartitionError(f"{name} ({node.target}) cannot run on its shards: {error}") from error


def _check_shape(node: fx.Node, value: Any) -> None:
    """A shard of another size than the axes say is a mistake even where the numbers come out right."""
    if "shape" in node.meta and isinstance(value, torch.Tensor):
        name, expected = node.meta["shape"]
        if list(value.shape) != list(expected):
            raise PartitionError(f"{name} ({node.target}) has shape {list(value.shape)} where its axes say {expected}")


def _group(args: Sequence[Any]) -> str | None:
    return next((arg for arg in args if isinstance(arg, str) and is_simulated(arg)), None)
