"""Stages, patches and branches of guidance on communicators that do one thing after the other."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from queues import Begin, Compute, Event, Recorder, Stuck, play, recorded
from torch import fx, nn

from xdit_compile.distributed.mesh import Mesh, channels
from xdit_compile.distributed.messages import ALIGNED, length, pack, unpack
from xdit_compile.ir.patch_layout import PatchLayout
from xdit_compile.ir.program import Input
from xdit_compile.passes.fuse.timings import Timings
from xdit_compile.passes.stages.assign_stages import Stage
from xdit_compile.passes.stages.stage_programs import StagePrograms
from xdit_compile.plan import Plan
from xdit_compile.plan.methods import BATCH, DATA, MEMBERS, SEQUENCE, TEAM
from xdit_compile.runtime.generation import Generation
from xdit_compile.runtime.methods.flow import Flow
from xdit_compile.runtime.methods.pipefusion import PipelineRunner
from xdit_compile.runtime.session import Target
from xdit_compile.runtime.tensors.patched_tensor import whole_of
from xdit_compile.weights.weights import Weights

ROWS = 2
"""Positions of a patch."""


class Stages(PipelineRunner):
    """The runner of a rank whose stage computes nothing: how long that would take is noted."""

    flow: Flow

    def _known(self, args: tuple, kwargs: dict) -> tuple[Any, list[Any]]:
        return self.flow, list(args)


def tensors(*shapes: tuple[int, ...], device: str = "meta") -> tuple[torch.Tensor, ...]:
    """Of two dtypes."""
    dtypes = torch.float32, torch.bfloat16
    return tuple(torch.zeros(shape, dtype=dtypes[at % 2], device=device) for at, shape in enumerate(shapes))


def stages_on(plan: Plan, mesh: Mesh, recorder: Recorder) -> Stages:
    session: Any = types.SimpleNamespace(
        place=Target(plan, mesh, None),  # type: ignore[arg-type]
        branches=types.SimpleNamespace(active=False),
        agreement=types.SimpleNamespace(exchange=lambda *_: {}),
        generation=Generation(plan.warmup_steps),
        before_request=lambda do: None,
        after_request=lambda do: None,
        after_failure=lambda do: None,
        keeper=lambda *_: None,
        timings=lambda device: Timings(),
    )
    runner = Stages(Weights(nn.Identity()), session)
    empty = fx.GraphModule({}, fx.Graph())
    outcome = types.SimpleNamespace(filled=lambda found: types.SimpleNamespace(result=found[0]))
    count, first, last = plan.patch_count, runner.stage == 0, runner.stage == runner.last

    def run(rows: int, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        recorder.computed(rows / ROWS)
        return tensors((1, rows, 4), *(() if last else [(3,)]), device="cpu")

    def stage(rows: int, kind: Any) -> Stage:
        inputs = (Input("x", kind, 0),) if first else ()
        program: Any = types.SimpleNamespace(inputs=inputs, outcome=outcome, root=empty)
        between = tensors((1, rows, 4), (3,))
        return Stage(program, () if first else between, () if last else between)

    positions = tuple(tuple(range(at * ROWS, (at + 1) * ROWS)) for at in range(count))
    layout, whole = PatchLayout(2, positions), tensors((1, ROWS * count, 4))
    full, patches = stage(ROWS * count, "user"), tuple(stage(ROWS, "patch") for _ in range(count))
    common: Any = types.SimpleNamespace(inputs=(), root=empty)
    pipeline = StagePrograms(runner.stage, full, common, (), patches, (0,), {0: layout}, (layout,), whole)
    runs = tuple(functools.partial(run, rows) for rows in (ROWS * count, *[ROWS] * count))
    analysis: Any = types.SimpleNamespace(units={})
    runner.flow = Flow(lambda: analysis, full.program, runs[0], pipeline, tuple, runs)
    return runner


def generate(plan: Plan, mesh: Mesh, steps: int, calls: int, recorder: Recorder) -> None:
    """A pipeline's loop with a scheduler that is pointwise, and ``calls`` branches of guidance."""
    runner = stages_on(plan, mesh, recorder)
    prompts = [torch.full((1, 3), float(at)) for at in range(calls)]
    with runner.generation.running(steps):
        latents: torch.Tensor = torch.zeros(1, ROWS * plan.patch_count, 4)
        for _ in range(steps):
            found = [runner._run((latents, prompt), {}).result for prompt in prompts]
            latents = latents - 0.1 * functools.reduce(torch.add, found)
        whole_of(latents)


@functools.cache
def played(plan: Plan, steps: int, calls: int = 1) -> list[Recorder]:
    """What every rank does to connect and in a generation."""
    meshes = [Mesh.named(plan, rank) for rank in range(plan.world_size)]
    return [recorded(mesh, functools.partial(generate, plan, mesh, steps, calls), plan.rows.ring) for mesh in meshes]


def programs(plan: Plan, steps: int, calls: int = 1) -> list[list[Event]]:
    return [recorder.events for recorder in played(plan, steps, calls)]


FIVE, STEPS = Plan(pipefusion=5, patches=8), 4
WARM_UP, IDEAL = 5 * 8, 5 * 8 + (STEPS - 1) * 8 + 4
"""How long five stages take to compute all tokens, and how long they take if nobody ever waits once all are busy."""


def test_stages_overlap_where_every_edge_has_a_queue() -> None:
    assert play(programs(FIVE, STEPS), 0.0) == IDEAL
    assert play(programs(FIVE, STEPS), 0.1) < 1.05 * IDEAL


def test_stages_do_not_overlap_where_edges_share_one() -> None:
    """In one queue a stage between receives every patch before it sends the first.

    In one for both directions nothing moves: the first stage has asked for results before it sends what they come of.
    """
    (back,) = [group.queue for group in played(FIVE, STEPS)[0].groups if group.role.endswith("4>0")]
    steady = play(programs(FIVE, STEPS), 0.0, lambda name: name if name == back else "") - WARM_UP
    assert steady > 2 * (IDEAL - WARM_UP)
    with pytest.raises(Stuck):
        play(programs(FIVE, STEPS), 0.0, lambda name: "")


GUIDED = Plan(pipefusion=2, patches=3, cfg=2)


@pytest.mark.parametrize(
    ("plan", "calls"),
    [(FIVE, 1), (Plan(pipefusion=2), 2), (GUIDED, 2), (GUIDED, 3), (Plan(patches=2, cfg=3), 2)],
)
def test_nobody_waits_for_ever(plan: Plan, calls: int) -> None:
    """Neither while ranks connect nor later, however long a transfer takes.

    Every queue is of one thing, which was done once before anything is computed: nothing connects later.
    """
    for seconds in (0.0, 0.3, 30.0):
        play(programs(plan, STEPS, calls), seconds)
    ranks = played(plan, STEPS, calls)
    assert all(each.groups == ranks[0].groups for each in ranks), "groups are made in one order"
    for each in ranks:
        asked: dict[str, set[tuple[Any, ...]]] = {}
        for event in each.events:
            if isinstance(event, Begin) and event.what != ("all",):
                asked.setdefault(event.queue, set()).add(event.what[:2])
        assert all(len(pairs) == 1 for pairs in asked.values()), "no queue has transfers both ways, or to two ranks"
        assert ways(each.events) == ways(itertools.takewhile(lambda event: not isinstance(event, Compute), each.events))


def ways(events: Iterable[Event]) -> set[tuple[Any, ...]]:
    """In which communicators something is asked for, and of what kind."""
    return {(event.queue, *event.what[:2]) for event in events if isinstance(event, Begin)}


def test_two_pipelines_share_the_branches_of_guidance() -> None:
    """Each computes one of two calls, and one call costs a pipeline of its own as much."""
    both, one = (play(programs(plan, STEPS, 2), 0.05) for plan in (GUIDED, Plan(pipefusion=2, patches=3)))
    assert both < 0.65 * one


def test_a_patch_is_one_message() -> None:
    """Of the stage between: so many tensors as it is given come at once, and go on at once."""
    events = played(FIVE, STEPS)[1].events
    asked = [event for event in events if isinstance(event, Begin) and event.what != ("all",) and event.what[2] > 1]
    assert len(asked) == 2 * (1 + 8 * (STEPS - 1))
    assert sum(isinstance(event, Compute) for event in events) == 1 + 8 * (STEPS - 1)


def scattered() -> list[torch.Tensor]:
    return [
        torch.tensor(True),
        torch.empty(0, 4, dtype=torch.float64),
        torch.arange(15.0).reshape(3, 5).T,
        torch.arange(6).reshape(2, 3)[:, 1:],
        torch.full((7,), 1.5, dtype=torch.bfloat16),
        torch.tensor([1 + 2j, 3j]).conj(),
        torch.empty(0, dtype=torch.int8),
    ]


def test_a_message_has_tensors_of_any_form() -> None:
    given = scattered()
    message = pack(given, torch.device("cpu"))
    found = unpack(message, [each.to("meta") for each in given])
    assert message.shape == (length(given),) and message.dtype == torch.uint8
    for one, other in zip(given, found, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and other.is_contiguous()
        assert not other.numel() or (other.data_ptr() - message.data_ptr()) % ALIGNED == 0


def test_a_tensor_alone_is_its_message() -> None:
    for alone in (torch.arange(6.0).reshape(2, 3), torch.tensor(1.5)):
        given = [torch.empty(0), alone]
        message = pack(given, alone.device)
        assert message.data_ptr() == alone.data_ptr() and message.shape == (length(given),)
        assert torch.equal(unpack(message, given)[1], alone)
    assert length([torch.empty(0, 3)]) == 0


@pytest.mark.parametrize(
    ("plan", "made", "own"),
    [
        (Plan(), 0, 0),
        (Plan(ulysses=8), 1, 1),
        (Plan(ulysses=4, ring=2), 2 + 4 + 1, 3),
        (Plan(cfg=2, ulysses=4), 4 + 2 + 1, 3),
        (Plan(data=2, cfg=2, ulysses=2), 4 + 4 + 4 + 2 + 1, 5),
        (Plan(data=2, cfg=2, ulysses=2, vae="patch"), 4 + 4 + 4 + 2 + 1 + 2, 6),
        (Plan(data=2, cfg=2, ulysses=2, vae="patch", vae_degree=2), 4 + 4 + 4 + 2 + 1, 5),
        (Plan(pipefusion=8), 1 + 8, 3),
        (Plan(pipefusion=2, tensor=4), 4 + 2 + 1 + 8, 5),
        (Plan(pipefusion=4, cfg=2), 2 + 4 + 1 + 8 + 4, 6),
        (Plan(patches=4, cfg=2), 1 + 2, 3),
        (Plan(data=2, cfg=2, patches=2), 2 + 1 + 4, 4),
        (Plan(distrifusion=8), 2, 2),
        (Plan(distrifusion=4, cfg=2), 2 + 2 + 4 + 1, 4),
    ],
)
def test_no_more_groups_than_are_used(plan: Plan, made: int, own: int) -> None:
    """All that ranks make together, and those of the first among them."""
    found = dict.fromkeys(channel for _, channel in channels(Mesh.named(plan, 0), plan.rows.ring))
    assert len(found) == made
    assert sum(0 in channel.ranks for channel in found) == own


def test_whoever_asks_for_a_group_finds_one() -> None:
    """In every plan, by what asks for it."""
    degrees = ("data", "cfg", "pipefusion", "distrifusion", "ring", "ulysses", "tensor")
    for several in itertools.product((1, 2), repeat=len(degrees)):
        for vae in ("whole", "patch"):
            plan = Plan(**dict(zip(degrees, several, strict=True)), vae=vae)  # type: ignore[arg-type]
            if not plan.problems():
                asked(Mesh.named(plan, 0), plan)


def asked(mesh: Mesh, plan: Plan) -> None:
    meeting = [*MEMBERS.values(), ("ring",), ("ulysses",), ("pipefusion",), mesh.names]
    meeting += [("cfg",)] if plan.patch_count == 1 else []
    meeting += [TEAM] if plan.pipefusion > 1 else []
    rows = mesh.shared_rows(plan)
    for place, sets in ((mesh, meeting), (rows, [MEMBERS[BATCH], MEMBERS[DATA], MEMBERS[SEQUENCE]])):
        for names in sets:
            assert bool(place.group(names)) == (place.size(names) > 1)
    made = {role for role, _ in channels(mesh, plan.rows.ring)}
    assert {*mesh.groups.values(), *filter(None, rows.groups.values())} <= made
