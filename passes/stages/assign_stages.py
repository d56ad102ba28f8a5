"""Cuts a program into the stages of a pipeline: runs of neighbouring blocks, one run for each rank.

What depends on no input that changes from patch to patch (embeddings of the time step and of the prompt) is computed by
every stage that needs it. Everything else belongs to the stage in which it is computed, and what later stages need of
it travels along the pipeline.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from xdit_compile.errors import PlanError
from xdit_compile.ir.program import Program
from xdit_compile.ir.subgraph import reached, subgraph
from xdit_compile.passes.axes.flops import flops
from xdit_compile.passes.axes.infer import Inference
from xdit_compile.plan.methods import PATCH

EVERYWHERE = -1
"""The stage of a call that every stage makes that needs it."""
Stages = dict[str, int]
"""The stage of each call of the captured root graph, by its name."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage's part of a program.

    ``program`` takes, after its own inputs, what earlier stages send, and gives what later ones need; the last stage
    gives the results. ``received`` and ``sent`` name these values and carry them as tensors on the meta device.
    """

    program: Program
    received: tuple[torch.Tensor, ...]
    sent: tuple[torch.Tensor, ...]


def assign(
    inference: Inference, varying: Iterable[str], count: int, layers: Sequence[int] | None, places: dict[str, int]
) -> Stages:
    """The stage of every call.

    Args:
        varying: names of the inputs that differ from patch to patch.
        count: how many stages.
        layers: blocks of each stage; the even share of their cost for None.
        places: the stages of blocks by their paths, as they were found before; found here, they are added.

    Raises:
        PlanError: fewer blocks than stages, or ``layers`` that do not add up to them.
    """
    root = inference.program.root
    varies = _varying(root.graph, set(varying))
    blocks: list[fx.Node] = [call for call in inference.program.calls() if call.meta.get("repeated") and call in varies]
    if not all(block.meta["path"] in places for block in blocks):
        _place(inference, blocks, count, layers, places)
    stages: Stages = {}
    place: dict[fx.Node, int] = {}
    left = len(blocks)
    for node in root.graph.nodes:
        earlier = max((place.get(each, 0) for each in node.all_input_nodes), default=0)
        if node.op == "call_module" and node not in varies:
            stages[node.name] = EVERYWHERE
        elif node in blocks:
            place[node] = stages[node.name] = max(places[node.meta["path"]], earlier)
            left -= 1
        elif node.op == "call_module":
            place[node] = stages[node.name] = earlier if left else count - 1
        elif node in varies:
            place[node] = earlier
    return stages


def _place(
    inference: Inference, blocks: Sequence[fx.Node], count: int, layers: Sequence[int] | None, places: dict[str, int]
) -> None:
    """Choose the stages of blocks, in order."""
    if layers is not None and (len(layers) != count or sum(layers) != len(blocks)):
        raise PlanError(
            f"stage_layers={tuple(layers)!r} must be {count} numbers that add up to {len(blocks)} blocks, as many as "
            "this denoiser has"
        )
    if count > len(blocks):
        raise PlanError(too_many_stages(count, len(blocks)))
    costs = {frame.call: sum(map(flops, frame.graph.nodes)) for frame in inference.frames}
    sizes = layers or balanced([costs[block] for block in blocks], count)
    places.clear()
    stages = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    places.update((block.meta["path"], stage) for block, stage in zip(blocks, stages, strict=True))


def too_many_stages(count: int, blocks: int) -> str:
    """What to say where there are fewer blocks than stages."""
    several = f"; take at most pipefusion={blocks}" if blocks > 1 else "; take another method"
    return (
        f"pipefusion={count} makes {count} stages of at least one block each, and this denoiser has {blocks}{several}"
    )


def everywhere(inference: Inference, varying: Iterable[str]) -> set[str]:
    """Names of the calls that depend on no input that varies."""
    varies = _varying(inference.program.root.graph, set(varying))
    return {call.name for call in inference.program.calls() if call not in varies}


def _varying(graph: fx.Graph, inputs: set[str]) -> set[fx.Node]:
    """The nodes that depend on these inputs."""
    varies: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in inputs if node.op == "placeholder" else any(each in varies for each in node.all_input_nodes):
            varies.add(node)
    return varies


def balanced(costs: Sequence[float], parts: int) -> list[int]:
    """How many neighbours each part takes so that the costliest part costs least; every part takes one at least."""
    sums = [0.0, *itertools.accumulate(costs)]
    best = {(0, 0): (0.0, 0)}
    for stage in range(1, parts + 1):
        for end in range(stage, len(costs) - (parts - stage) + 1):
            best[stage, end] = min(
                (max(best[stage - 1, start][0], sums[end] - sums[start]), start)
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            )
    ends = [len(costs)]
    for stage in range(parts, 0, -1):
        ends.append(best[stage, ends[-1]][1])
    return [stop - start for stop, start in itertools.pairwise(ends)][::-1]


def cut(program: Program, stages: Stages, varying: Iterable[str], count: int) -> list[Stage]:
    """The stages of one rank's program.

    Args:
        stages: what `assign` says of the captured calls.
        varying: names of the captured inputs that the first stage alone is given patch by patch.
        count: how many stages.
    """
    first = {f"{name}_{PATCH}" for name in varying}
    place: dict[fx.Node, int] = {}
    for node in program.root.graph.nodes:
        if node.op == "placeholder":
            place[node] = 0 if node.name in first else EVERYWHERE
        elif node.meta.get("captured") in stages:
            place[node] = stages[node.meta["captured"]]
        elif node.op != "output":
            place[node] = max((place[each] for each in node.all_input_nodes), default=EVERYWHERE)
    return [_stage(program, place, stage, count) for stage in range(count)]


def _stage(program: Program, place: dict[fx.Node, int], stage: int, count: int) -> Stage:
    """The calls of one stage, those that every stage makes where it needs them, and what travels past it."""
    (output,) = program.root.graph.find_nodes(op="output")
    received = _crossing(program, place, stage - 1) if stage else []
    sent = _crossing(program, place, stage) if stage < count - 1 else []
    here = {node for node, of_node in place.items() if of_node in (EVERYWHERE, stage)}
    of_stage = _part(program, sent if stage < count - 1 else list(output.args[0]), here, received)
    return Stage(of_stage, *(tuple(node.meta["val"] for node in nodes) for nodes in (received, sent)))


def only(program: Program, results: Sequence[fx.Node]) -> Program:
    """What of a program it takes to compute some values of its root."""
    return _part(program, results, set(program.root.graph.nodes), ())


def _part(program: Program, results: Sequence[object], here: set[fx.Node], received: Sequence[fx.Node]) -> Program:
    """A program of some nodes of a root, given other values after its own inputs."""
    needed, graph = reached(results, here.__contains__), program.root.graph
    placeholders = [node for node in graph.find_nodes(op="placeholder") if node in needed and node not in received]
    inputs = {node: node.name for node in placeholders} | {node: f"{node.name}_received" for node in received}
    nodes = [node for node in graph.nodes if node in needed]
    modules = {str(node.target): getattr(program.root, str(node.target)) for node in nodes if node.op == "call_module"}
    specs = {spec.name: spec for spec in program.inputs}
    root = fx.GraphModule(modules, subgraph(inputs, nodes, results))
    return dataclasses.replace(program, root=root, inputs=tuple(specs[node.name] for node in placeholders))


def _crossing(program: Program, place: dict[fx.Node, int], stage: int) -> list[fx.Node]:
    """The tensors made up to a stage that later ones need, in their order."""
    crossing = []
    for node in program.root.graph.nodes:
        made = EVERYWHERE < place.get(node, EVERYWHERE) <= stage
        if made and node.op != "call_module" and any(place.get(user, stage + 1) > stage for user in node.users):
            crossing.append(node)
    return crossing
