"""What ``explain`` says of collectives: the published formulas, and what really leaves a rank."""

from __future__ import annotations

import collections

import pytest
from splitting import captured, partition_all
from zoo import real as zoo_real

import xdit_compile
from xdit_compile import Plan
from xdit_compile.distributed.mesh import simulated_members
from xdit_compile.kernels.collectives.registration import elements_sent
from xdit_compile.runtime.verify.simulated_mesh import run_simulated

BLOCKS = 2


@pytest.mark.parametrize(
    ("name", "tokens", "hidden", "batch", "attentions"),
    [("flux", 512 + 4096, 3072, 1, 2 * BLOCKS), ("pixart", 4096, 1152, 2, BLOCKS)],
)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_elements_that_leave_a_rank(
    name: str, tokens: int, hidden: int, batch: int, attentions: int, ranks: int, method: str
) -> None:
    case = zoo_real.REAL[name]
    args, kwargs = case.inputs()
    found = xdit_compile.explain(case.build(BLOCKS), Plan(**{method: ranks}), args=args, kwargs=kwargs)
    (entry,) = (item for item in found.collectives if item.purpose == "attention")
    volume = batch * tokens * hidden * attentions
    if method == "ulysses":
        assert entry.op == "all_to_all" and entry.count == 2 * attentions
        assert entry.elements * ranks**2 == 4 * volume * (ranks - 1)
    else:
        assert entry.op == "ring_attention" and entry.count == attentions
        assert entry.elements * ranks == 2 * volume * (ranks - 1)


FLUX_REDUCES = (5 * BLOCKS, 3 * BLOCKS * 4608 * 3072)
"""Attention and feed-forward of each stream in a double block, one sum in a single block; elements of all together."""
PIXART_REDUCES = (3 * BLOCKS + 1, 3 * BLOCKS * 2 * 4096 * 1152 + 2 * 300 * 1152)
"""Both attentions and the feed-forward of each block, and the caption's projection once."""


@pytest.mark.parametrize(("name", "reduces"), [("flux", FLUX_REDUCES), ("pixart", PIXART_REDUCES)])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_all_reduces_of_tensor_parallel(name: str, reduces: tuple[int, int], ranks: int) -> None:
    case = zoo_real.REAL[name]
    args, kwargs = case.inputs()
    found = xdit_compile.explain(case.build(BLOCKS), Plan(tensor=ranks), args=args, kwargs=kwargs)
    (entry,) = (item for item in found.collectives if item.purpose == "partial sum")
    count, volume = reduces
    assert entry.op == "all_reduce" and entry.count == count
    assert entry.elements * ranks == 2 * volume * (ranks - 1)
    assert not found.gathers


@pytest.mark.parametrize(
    ("name", "keys", "most"), [("flux", 4608 * 3072, 1.1), ("pixart", 2 * 4096 * 1152, 1.25)], ids=["flux", "pixart"]
)
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(ulysses=4), marks=pytest.mark.slow),
        pytest.param(Plan(ring=4), marks=pytest.mark.slow),
        Plan(ulysses=2, ring=2),
        pytest.param(Plan(tensor=4), marks=pytest.mark.slow),
        Plan(tensor=2, ulysses=2),
    ],
    ids=lambda plan: " ".join(f"{name} {getattr(plan, name)}" for name in plan._shown()),
)
def test_keys_and_weights_that_a_rank_holds(name: str, keys: int, most: float, plan: Plan) -> None:
    """A table of positions is whole on every rank, and with two blocks it is no small part."""
    case = zoo_real.REAL[name]
    args, kwargs = case.inputs()
    module = case.build(BLOCKS)
    whole = xdit_compile.explain(module, Plan(), args=args, kwargs=kwargs).memory
    memory = xdit_compile.explain(module, plan, args=args, kwargs=kwargs).memory
    assert whole["keys_values"] == 2 * keys * 4
    assert memory["keys_values"] * plan.world_size == whole["keys_values"]
    assert whole["weights"] <= memory["weights"] * plan.tensor <= most * whole["weights"]
    if plan.tensor == 1:
        assert memory["largest_activation"] <= 1.1 * whole["largest_activation"] / plan.sequence


@pytest.mark.parametrize("name", ["flux", "pixart", "sana", "sd3"])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(ulysses=2),
        Plan(ulysses=5, link="1B/s"),
        Plan(ring=3),
        Plan(ulysses=2, ring=2),
        Plan(tensor=3),
        Plan(tensor=2, ulysses=2),
    ],
    ids=str,
)
def test_the_ledger_is_what_is_really_sent(name: str, plan: Plan) -> None:
    model = captured(name)
    ranks = partition_all(model.inference, plan)
    sent: dict[int, collections.Counter] = collections.defaultdict(collections.Counter)

    def observe(rank: int, op: object, args: tuple) -> None:
        (group,) = (arg for arg in args if isinstance(arg, str) and arg.startswith("sim/"))
        members = simulated_members(group)
        sent[rank][op._schema.name.split("::")[1]] += elements_sent(op, args, len(members), members.index(rank))

    run_simulated([rank.program for rank in ranks], model.module, model.args, model.kwargs, observe)
    for index, rank in enumerate(ranks):
        said: collections.Counter = collections.Counter()
        for item in rank.ledger.collectives:
            said[item.op] += item.elements
        assert said == sent[index]
