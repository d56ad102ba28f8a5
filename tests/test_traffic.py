"""What ``explain`` says of collectives: the published formulas, and what really leaves a rank."""

from __future__ import annotations

import collections

import pytest
import zoo_real
from splitting import captured, partition_all

import xdit_compile
from xdit_compile import Plan
from xdit_compile.kernels.traffic import elements_sent
from xdit_compile.mesh import simulated_members
from xdit_compile.simulated import run_simulated

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


@pytest.mark.parametrize("name", ["flux", "pixart", "sana", "sd3"])
@pytest.mark.parametrize("degrees", [(2, 1), (1, 3), (2, 2)])
def test_the_ledger_is_what_is_really_sent(name: str, degrees: tuple[int, int]) -> None:
    model = captured(name)
    ranks = partition_all(model.inference, Plan(ulysses=degrees[0], ring=degrees[1]))
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
