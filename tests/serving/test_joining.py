"""Calls of several requests run as one, and each gets what it would get alone; work that takes turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splitting import CASES, worst_difference
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile import Plan, parallelize
from xdit_compile.api import runner_of
from xdit_compile.ir.results import tensors_of
from xdit_compile.serving.ranks.gate import Call, Gate
from xdit_compile.serving.ranks.joining import Joiner
from xdit_compile.serving.ranks.strands import CURRENT, Cancelled, Strand

QUICK = {"pixart", "cogvideox_rotary"}
APART = {"hidream", "framepack", "unet_motion"}
"""Models of the zoo whose calls do not join."""
CPU = torch.device("cpu")


class MixesSamples(nn.Module):
    """What one sample gets depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x - x.mean(0, keepdim=True))


def calls_of(module: nn.Module, args: tuple, kwargs: dict[str, Any], count: int) -> list[Call]:
    """Calls of one form: the first input of each that is not whole numbers is another."""
    parallelize(module, Plan(backend="eager", cache=None))
    runner = runner_of(module)
    assert runner is not None
    gate, leaves, calls = Gate("module", runner), *pytree.tree_flatten((args, kwargs))[:1], []
    spec = pytree.tree_structure((args, kwargs))
    wide = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.dim() > 1]
    first = next(i for i in wide if leaves[i].is_floating_point())
    for index in range(count):
        changed = [leaf * (1 - 0.2 * index) if i == first else leaf for i, leaf in enumerate(leaves)]
        calls.append(Call(gate, *pytree.tree_unflatten(changed, spec)))
    return calls


def joiner_of(calls: list[Call], most: int = 4) -> Joiner:
    return Joiner(calls[0].gate.session.agreement, most, {})


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in CASES])
@torch.no_grad()
def test_each_call_gets_what_it_gets_alone(name: str) -> None:
    torch.manual_seed(0)
    calls = calls_of(CASES[name].build(), *CASES[name].inputs(), 3)
    alone = [tensors_of(call.gate.runner(*call.args, **call.kwargs)) for call in calls]
    joiner = joiner_of(calls)
    made = joiner.run(calls)
    assert max(worst_difference(tensors_of(one), other) for one, other in zip(made, alone, strict=True)) <= 2e-5
    assert joiner.key(calls[0]).endswith(" alone") == (name in APART)


@torch.no_grad()
def test_samples_that_mix_do_not_join() -> None:
    calls = calls_of(MixesSamples().eval(), (torch.randn(2, 4),), {}, 2)
    joiner = joiner_of(calls)
    made = joiner.run(calls)
    for call, one in zip(calls, made, strict=True):
        assert torch.equal(one, call.gate.runner(*call.args))
    assert joiner.key(calls[0]).endswith(" alone")


@torch.no_grad()
def test_only_equal_inputs_that_all_samples_share_join() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * time

    calls = calls_of(Scaled().eval(), (torch.randn(2, 4), torch.tensor(3.0)), {}, 2)
    joiner = joiner_of(calls)
    joiner.run(calls)
    later = Call(calls[0].gate, (calls[0].args[0], torch.tensor(2.0)), {})
    assert joiner.key(calls[0]) == joiner.key(calls[1]) != joiner.key(later)


def test_strands_take_turns_and_draw_what_they_would_alone() -> None:
    said: list[str] = []

    def work(name: str) -> Any:
        def run() -> list[float]:
            drawn = []
            for _ in range(2):
                said.append(name)
                drawn.append(float(torch.rand(())))
                assert CURRENT.strand is not None
                drawn.append(CURRENT.strand.ask(name))
            return drawn

        return run

    one, other = Strand(work("one"), 1, CPU), Strand(work("other"), 2, CPU)
    before = torch.get_rng_state()
    for strand in (one, other, other, one, one, other):
        strand.go_on(7.0)
    assert said == ["one", "other", "other", "one"] and one.over and other.over
    torch.manual_seed(1)
    assert one.result == [float(torch.rand(())), 7.0, float(torch.rand(())), 7.0]
    torch.set_rng_state(before)


def test_a_strand_ends_where_it_waits() -> None:
    cleaned = []

    def work() -> None:
        try:
            assert CURRENT.strand is not None
            CURRENT.strand.ask("more")
        except Exception:  # noqa: BLE001 - what pipelines catch must not keep it
            pytest.fail("an Exception")
        finally:
            cleaned.append(True)

    strand = Strand(work, 0, CPU)
    strand.go_on()
    strand.go_on(failure=Cancelled())
    assert strand.over and isinstance(strand.error, Cancelled) and cleaned
