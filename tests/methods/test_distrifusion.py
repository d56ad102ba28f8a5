"""DistriFusion: ranks that share tokens and do not wait for one another, stale as published, nothing more than that."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import procs
import pytest
import torch
from queues import Begin, Compute, Event, Wait, play
from splitting import Captured, captured, worst_difference
from stale_reference import Reference, along, difference, digest_of
from torch import fx, nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from zoo.pipelines import PIPELINES
from zoo.transformers import MODELS
from zoo.unets import UNETS

import xdit_compile
from xdit_compile import Plan, XditCompileError
from xdit_compile.capture.interpret import assemble, bind
from xdit_compile.compiler import place
from xdit_compile.distributed.mesh import Mesh, is_simulated, simulated_members
from xdit_compile.kernels.collectives.registration import collective
from xdit_compile.passes.local.ledger import STALE
from xdit_compile.runtime.generation import Generation
from xdit_compile.runtime.methods.distrifusion import StaleCall
from xdit_compile.runtime.verify.simulated_mesh import run_ranks
from xdit_compile.weights.weights import Weights

Masks = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def tokens_of(*sizes: int) -> Callable[[int, int], list[torch.Tensor] | None]:
    """Positions of the tokens of each rank, in sections of these sizes each of which ranks share evenly."""

    def positions(ranks: int, tokens: int) -> list[torch.Tensor] | None:
        if tokens != sum(sizes):
            return None
        sections = torch.arange(tokens).split(sizes)
        return [torch.cat([torch.tensor_split(section, ranks)[rank] for section in sections]) for rank in range(ranks)]

    return positions


def pixels(sizes: tuple[int, ...], scale: int) -> Callable[[int], list[torch.Tensor]]:
    """Masks of what ranks make of a picture whose flattened tokens they share, of ``scale`` pixels a side."""

    def masks(ranks: int) -> list[torch.Tensor]:
        count = int(torch.tensor(sizes).prod())
        owner = torch.cat([torch.full((len(part),), rank) for rank, part in
                           enumerate(torch.tensor_split(torch.arange(count), ranks))]).reshape(sizes)  # fmt: skip
        for dim in (-1, -2):
            owner = owner.repeat_interleave(scale, dim)
        return [owner == rank for rank in range(ranks)]

    return masks


def rows(count: int) -> Callable[[int], list[torch.Tensor]]:
    """Masks of what ranks make of tokens along the dim before the last."""
    return lambda ranks: [
        torch.isin(torch.arange(count), part)[:, None] for part in torch.tensor_split(torch.arange(count), ranks)
    ]


def shares(height: int, cuts: int) -> Callable[[int, int], list[torch.Tensor] | None]:
    """Rows of each rank of a picture so high, or smaller by a power of two, cut at multiples of ``height / cuts``."""

    def positions(ranks: int, size: int) -> list[torch.Tensor] | None:
        if size not in (height, height // 2, height // 4):
            return None
        return [torch.arange(size).reshape(cuts, -1)[part].flatten() for part in
                torch.tensor_split(torch.arange(cuts), ranks)]  # fmt: skip

    return positions


def columns(ranks: int, size: int) -> list[torch.Tensor] | None:
    """Columns of each rank."""
    return list(torch.tensor_split(torch.arange(size), ranks)) if size == 11 else None


def grids(height: int, width: int, cuts: int) -> Callable[[int, int], list[torch.Tensor] | None]:
    """Tokens of these rows."""

    def positions(ranks: int, tokens: int) -> list[torch.Tensor] | None:
        sides = [(height // scale, width // scale) for scale in (1, 2, 4)]
        grid = next((side for side in sides if side[0] * side[1] == tokens), None)
        held = shares(height, cuts)(ranks, grid[0]) if grid is not None else None
        return held and [torch.arange(tokens).reshape(grid)[part].flatten() for part in held]

    return positions


def bands(height: int, cuts: int) -> Callable[[int], list[torch.Tensor]]:
    """Masks of these rows of the picture."""

    def masks(ranks: int) -> list[torch.Tensor]:
        held = shares(height, cuts)(ranks, height)
        assert held is not None
        return along(held, height, 2)

    return masks


# name: tokens of each rank in an attention, pixels of each in the result, branch
CASES: dict[str, tuple[Any, Any, Callable[[tuple, dict], Hashable]]] = {
    "flux": (tokens_of(13, 77), rows(77), lambda args, kwargs: 0),
    "sd3": (tokens_of(77, 13), pixels((7, 11), 2), lambda args, kwargs: 0),
    "pixart": (tokens_of(77), pixels((7, 11), 2), lambda args, kwargs: 0),
    "hunyuandit": (tokens_of(77), pixels((7, 11), 2), lambda args, kwargs: 0),
    "wan": (tokens_of(175), pixels((5, 5, 7), 2), digest_of("encoder_hidden_states")),
    "qwenimage": (tokens_of(13, 77), rows(77), digest_of("encoder_hidden_states")),
    "sana": (
        lambda ranks, tokens: (
            [torch.arange(77).reshape(7, 11)[:, part].flatten() for part in columns(ranks, 11) or ()]
            if tokens == 77
            else None
        ),
        lambda ranks: along(columns(ranks, 11) or (), 11, 1),
        lambda args, kwargs: 0,
    ),
    "sd15": (grids(14, 22, 7), bands(14, 7), lambda args, kwargs: 0),
    "sdxl": (grids(12, 20, 3), bands(12, 3), lambda args, kwargs: 0),
}
SPACES = {"sana": (columns, 1), "sd15": (shares(14, 7), 2), "sdxl": (shares(12, 3), 2)}
"""Positions that convolutions slide over, and their dim from the end."""


def generate(rank: int, name: str, plan: Plan | None, steps: int) -> torch.Tensor:
    case = PIPELINES[name]
    pipe = case.build()
    if plan is not None:
        xdit_compile.parallelize(pipe, plan)
    return case.call(pipe, steps=steps)


def by_reference(name: str, ranks: int, steps: int) -> torch.Tensor:
    case = PIPELINES[name]
    tokens, masks, branch = CASES[name]
    pipe = case.build()
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    rows, back = SPACES.get(name, (None, 0))
    space = (functools.partial(rows, ranks), back) if rows is not None else None
    denoiser.forward = Reference(denoiser, functools.partial(tokens, ranks), masks(ranks), 1, branch, space, True)
    return case.call(pipe, steps=steps)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("sd3", 2),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in CASES if name != "sd3"),
        pytest.param("flux", 3, marks=pytest.mark.slow),
        pytest.param("pixart", 4, marks=pytest.mark.slow),
    ],
)
def test_the_staleness_is_the_published_one(name, ranks):
    exact, expected = generate(0, name, None, 5), by_reference(name, ranks, 5)
    for found in procs.run(generate, ranks, name, Plan(distrifusion=ranks, backend="eager"), 5):
        assert difference(found, expected) < 2e-5 < 1e-3 < difference(found, exact)


HYBRIDS = {
    "sd3": Plan(distrifusion=2, cfg=2, backend="eager"),
    "qwenimage": Plan(distrifusion=2, cfg=2, backend="eager"),
    "pixart": Plan(distrifusion=2, tensor=2, backend="eager"),
    "sd15": Plan(distrifusion=2, cfg=2, backend="eager"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
def test_other_degrees_change_nothing(name):
    """Guidance's branches (in one call, and in two) and tensor parallel beside it: the same latents."""
    expected = procs.run(generate, 2, name, Plan(distrifusion=2, backend="eager"), 4)[0]
    for found in procs.run(generate, 4, name, HYBRIDS[name], 4):
        assert difference(found, expected) < 2e-5


def twice(rank: int, name: str, plan: Plan) -> list[torch.Tensor]:
    """A run, one of another size, one that a callback gives up, and the first again; then one that is all warm-up."""
    case = PIPELINES[name]
    pipe = xdit_compile.parallelize(case.build(), plan)
    first = case.call(pipe, steps=3)
    case.call(pipe, steps=3, height=128, width=112)

    def give_up(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step:
            raise KeyboardInterrupt
        return given

    with pytest.raises(KeyboardInterrupt):
        case.call(pipe, steps=3, callback_on_step_end=give_up)
    second = case.call(pipe, steps=3)
    xdit_compile.restore(pipe)
    xdit_compile.parallelize(pipe, dataclasses.replace(plan, warmup_steps=3))
    return [first, second, case.call(pipe, steps=3)]


def test_nothing_of_a_generation_is_in_the_next():
    exact = generate(0, "sd3", None, 3)
    for first, second, waited in procs.run(twice, 2, "sd3", Plan(distrifusion=2, backend="eager")):
        assert torch.equal(first, second)
        assert difference(waited, exact) < 2e-5 < 1e-3 < difference(first, exact)


def loop(rank: int, name: str, plan: Plan, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    """Latents after four steps, and how many graphs had been compiled after each."""
    case = MODELS[name]
    module = xdit_compile.parallelize(case.build().to(dtype), plan)
    return steps_of(module, *inputs_of(name, dtype))


def inputs_of(name: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
    given: tuple[tuple, dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, MODELS[name].inputs()
    )
    return given


def steps_of(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    latents, graphs = kwargs["hidden_states"], []
    with (
        xdit_compile.generation(module) if isinstance(module, nn.Module) else contextlib.nullcontext(),
        torch.no_grad(),
    ):
        for _ in range(4):
            latents = latents - 0.1 * module(*args, **{**kwargs, "hidden_states": latents})[0]
            graphs.append(counters["aot_autograd"]["total"])
    return latents, graphs


@pytest.mark.slow
def test_in_float64_it_is_the_published_staleness_to_the_last_digits():
    tokens, masks, _ = CASES["sd3"]
    plain = Reference(MODELS["sd3"].build().double(), functools.partial(tokens, 3), masks(3), 1, apart=True)
    expected, _ = steps_of(plain, *inputs_of("sd3", torch.float64))
    for found, _ in procs.run(loop, 3, "sd3", Plan(distrifusion=3, backend="eager"), torch.float64):
        assert found.dtype == torch.float64 and difference(found, expected) < 1e-8


@pytest.mark.slow
def test_compiled_programs_do_not_compile_again():
    ((expected, _), _) = procs.run(loop, 2, "flux", Plan(distrifusion=2, backend="eager"), torch.float32)
    for found, graphs in procs.run(
        loop, 2, "flux", Plan(distrifusion=2, backend="inductor"), torch.float32, timeout=900
    ):
        assert difference(found, expected) < 2e-5
        assert len(set(graphs)) == 1 and graphs[0] > 0


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"distrifusion": 2, "ulysses": 2}, "distrifusion=2 shares the tokens, as ulysses=2 would; take one of them"),
        ({"distrifusion": 2, "pipefusion": 2}, "distrifusion=2 shares the tokens, as pipefusion=2 would"),
        ({"distrifusion": 2, "patches": 3}, "distrifusion=2 shares the tokens, as patches=3 would"),
        ({"distrifusion": 0}, "distrifusion=0 must be a whole number of at least 1"),
    ],
)
def test_plans_that_cannot_run(plan, said):
    with pytest.raises(XditCompileError, match=said):
        Plan(**plan).check()


def twice_a_step(rank: int, plan: Plan | None) -> torch.Tensor:
    """Steps of two calls that differ in a label for each image alone."""
    case = MODELS["dit"]
    module = case.build()
    (latents,), kwargs = case.inputs()
    other = {**kwargs, "class_labels": kwargs["class_labels"].flip(0)}
    if plan is not None:
        xdit_compile.parallelize(module, plan)
    running = xdit_compile.generation(module) if plan is not None else contextlib.nullcontext()
    with running, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            one, two = (module(latents, **each)[0] for each in (kwargs, other))
            latents = latents - 0.1 * (two + one)[:, : latents.shape[1]]
    return latents


@pytest.mark.slow
def test_calls_that_nothing_tells_apart_are_exact():
    expected = twice_a_step(0, None)
    for found in procs.run(twice_a_step, 2, Plan(distrifusion=2, backend="eager")):
        assert difference(found, expected) < 2e-5


def shared_by(name: str, ranks: int) -> tuple[Captured, list[StaleCall]]:
    """A model's programs on every rank of a simulated mesh."""
    model, plan = captured(name), Plan(distrifusion=ranks)
    analysis = model.analysis(plan)
    found = []
    for rank in range(ranks):
        fresh, stale = (place(analysis, plan, Mesh.simulated(plan, rank), stale=late) for late in (False, True))
        ways = fresh.program, fresh.program.root, stale.program, stale.program.root
        found.append(StaleCall(lambda: analysis, *ways, stale.outgoing, frozenset(), ()))
    return model, found


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["flux", "pixart", "unet_sdxl"])
def test_after_the_warm_up_nobody_waits_but_for_the_result(name, ranks):
    model, plan = captured(name), Plan(distrifusion=ranks)
    analysis = model.analysis(plan)
    for rank in range(ranks):
        ledger = place(analysis, plan, Mesh.simulated(plan, rank), stale=True).ledger
        waited = [each for each in ledger.collectives if each.op != STALE]
        assert [each.op for each in waited] == ["all_gather"] == ["all_gather"] * len(ledger.gathers)
        assert ledger.flops_here < 1.5 / ranks * ledger.flops
        if name == "flux":
            held = len(np.array_split(np.arange(77), ranks)[rank]) + len(np.array_split(np.arange(13), ranks)[rank])
            sent = sum(each.elements for each in ledger.collectives if each.op == STALE)
            assert sent == 2 * 5 * held * 90 * (ranks - 1), "keys and values of five blocks, to every other rank"


@pytest.mark.parametrize("name", ["flux", "unet_sdxl"])
def test_nothing_is_copied_to_be_sent_or_to_be_read(name):
    """A rank's rows of a state lie together, whatever sections ranks share; convolutions read the state itself."""
    _, ranks = shared_by(name, 2)
    for shared in ranks:
        root, aten = shared.stale.root, torch.ops.aten
        sent = root.graph.find_nodes(op="call_function", target=torch.ops.xdit_compile.gather_start.default)
        assert sent and all(each.args[0].target is aten.slice.Tensor for each in sent)
        structures = shared.stale.structures().values()
        read = [each.args[0] for one in structures for each in one.graph.nodes if "aten.conv" in str(each.target)]
        read += [each.args[0] for each in read if each.target is aten.constant_pad_nd.default]
        assert any(each.target is aten.slice.Tensor for each in read) == (name == "unet_sdxl")
        assert not any(each.target is aten.clone.default for each in read)


def asked_for(shared: StaleCall, calls: int) -> list[Event]:
    """What a rank asks others for in some calls that go on at once, if every structure computes for a second."""
    numbers, arriving = itertools.count(), dict[str, int]()
    events: list[Event] = []
    names = {given.name: str(given.target) for given in shared.stale.inputs if given.kind == "incoming"}

    def begin(node: fx.Node) -> int:
        (group,) = (arg for arg in node.args if isinstance(arg, str) and is_simulated(arg))
        events.append(Begin(next(numbers), group, ("all",), tuple(simulated_members(group))))
        return events[-1].number

    ops = torch.ops.xdit_compile
    for _ in range(calls):
        left: dict[fx.Node, int] = {}
        for node in shared.stale.root.graph.nodes:
            if node.op == "call_module":
                events.append(Compute(1))
                inner = getattr(shared.stale.root, node.target).graph.nodes
                events.extend(Wait(begin(each)) for each in inner if collective(each.target) and each.args[-1])
            elif node.target in (ops.halo_start.default, ops.gather_start.default):
                left[node] = begin(node)
            elif node.target is ops.stale_finish.default and arriving:
                events.append(Wait(arriving[names[node.args[1].name]]))
        (output,) = shared.stale.root.graph.find_nodes(op="output")
        sent = output.args[0][len(output.args[0]) - len(shared.outgoing) :]
        arriving = {name: left[node] for name, node in zip(shared.outgoing, sent, strict=True)}
    return events


@pytest.mark.parametrize("name", ["pixart", "sana", pytest.param("unet_sdxl", marks=pytest.mark.slow)])
def test_what_is_waited_for_stands_behind_nothing_that_is_not(name):
    """Communicators do one thing after the other: stale exchanges have one of their own."""
    _, shared = shared_by(name, 2)
    behind = {Mesh.simulated(Plan(distrifusion=2), rank).behind for rank in range(2)}
    once, thrice = ([asked_for(each, calls) for each in shared] for calls in (1, 3))
    seconds, computed = 5.0, sum(isinstance(event, Compute) for event in once[0])
    waited = sum(isinstance(event, Wait) for event in once[0])
    exchanges = [event for event in once[0] if isinstance(event, Begin) and event.queue in behind]
    assert len(exchanges) == len(shared[0].outgoing) > 2 and waited == 1
    assert play(once, seconds) == computed + seconds
    assert play(once, seconds, lambda name: "") > 2 * (computed + seconds)
    play(thrice, seconds)


@pytest.mark.parametrize(("steps", "waits"), [(2, 4), (3, 2), (None, 2)])
def test_a_generation_that_is_all_warm_up_waits_in_every_call(steps: int | None, waits: int) -> None:
    """Schedulers of a higher order have a denoiser called several times in a step, and so do some that correct."""
    generation, found = Generation(2), []
    with generation.running(steps):
        branch = generation.branch(object(), "program", [], dict)
        for _ in range(4):
            branch.enter((torch.zeros(1),))
            found.append(generation.waits(branch))
    assert found == [True] * waits + [False] * (4 - waits)


FAST = {"flux": 3, "pixart": 4, "sana": 2}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *FAST.items(),
        *(
            pytest.param(name, ranks, marks=pytest.mark.slow)
            for name in (*MODELS, *UNETS)
            for ranks in (2, 3, 8)
            if FAST.get(name) != ranks
        ),
    ],
)
def test_a_step_again_is_the_same(name, ranks):
    """What ranks leave one another is what they would have exchanged: any size, on simulated meshes."""
    model, shared = shared_by(name, ranks)
    leaves, weights = pytree.tree_leaves((model.args, model.kwargs)), Weights(model.module)
    states = [each.states(torch.device("cpu")) for each in shared]
    programs = [each.program for each in shared]
    for step in range(3):
        given = [bind(program, weights, leaves, state) for program, state in zip(programs, states, strict=True)]
        found = run_ranks(programs, given)
        for rank, each in enumerate(shared):
            if step:
                states[rank].update(
                    zip(each.outgoing, found[rank][len(found[rank]) - len(each.outgoing) :], strict=True)
                )
            assert worst_difference(assemble(programs[rank], found[rank]), model.expected) < 2e-5
        programs = [each.stale for each in shared]
    assert shared[0].outgoing
