"""Tokens shared by ranks that gather all keys before each attention: exact, and only keys and values are gathered."""

from __future__ import annotations

import procs
import pytest
from runtime.test_runtime import run_model
from splitting import captured, partition_all, run_split

from xdit_compile import Plan


@pytest.mark.parametrize("plan", [{"allgather": 2}, {"allgather": 3}, {"allgather": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["flux", "pixart", "qwenimage_masked"])
def test_every_rank_gives_what_one_process_gives(name: str, plan: dict[str, int]) -> None:
    model = captured(name)
    worst, ranks = run_split(model, Plan(**plan))
    whole = run_split(model, Plan())[1][0].ledger
    for rank in ranks:
        assert not [gather for gather in rank.ledger.gathers if gather.place.repeated]
        assert rank.ledger.flops_here < 0.7 * whole.flops_here, "half of the tokens, and what has none"
    assert worst <= 2e-5


def test_what_is_sent_are_keys_and_values() -> None:
    model, ranks = captured("flux"), 2
    gathered = partition_all(model.inference, Plan(allgather=ranks))[0].ledger.collectives
    attention = [each for each in gathered if each.purpose == "attention"]
    around = partition_all(model.inference, Plan(ring=ranks))[0].ledger.collectives
    assert {each.op for each in attention} == {"all_gather"}
    assert sum(each.bytes for each in attention) == sum(each.bytes for each in around if each.purpose == "attention")


def test_ranks_that_are_processes() -> None:
    assert max(procs.run(run_model, 2, "qwenimage_masked", Plan(allgather=2, backend="eager"))) <= 2e-5
