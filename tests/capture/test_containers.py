"""Lists and dicts that a module is given hold after a split call what they would hold after its own."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from torch import nn

import xdit_compile
from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.capture.interpret import run_outcome
from xdit_compile.capture.state.containers import Outcome
from xdit_compile.errors import CaptureError


class Takes(nn.Module):
    """Pops, appends, counts, keeps what it computed, and moves one container out of another."""

    def forward(self, x: torch.Tensor, skips: list, memory: dict, recent: collections.deque) -> torch.Tensor:
        x = x + skips.pop(0) + skips.pop()
        skips.append(x * 2)
        memory["steps"] = memory["steps"] + 1
        memory["last"] = x
        memory.pop("old", None)
        if "deep" in memory:
            memory["deep"]["seen"].append(x.sum(0))
        recent.append(skips[0])
        return x + memory["scale"]


def inputs() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    new = lambda: torch.randn(3, 4, generator=draw)  # noqa: E731
    return {
        "skips": [new(), new(), new(), new()],
        "memory": {"old": new(), "steps": 3, "scale": new(), "deep": {"seen": []}},
        "recent": collections.deque([new(), new()], maxlen=2),
    }


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for key, each in value.items() for part in (key, *flat(each))]
    return [part for each in value for part in flat(each)] if isinstance(value, list | collections.deque) else [value]


def test_the_callers_containers_hold_what_the_module_leaves_in_them() -> None:
    module, x = Takes().eval(), torch.ones(3, 4)
    given = inputs()
    expected = copy.deepcopy(given)
    untouched = [given["skips"][1], given["skips"][2], given["memory"]["scale"]]
    deep = given["memory"]["deep"]
    results = [module(x, **expected) for _ in range(2)]
    xdit_compile.parallelize(module, Plan(backend="eager"))
    assert torch.equal(module(x, **given), results[0])
    assert given["skips"][0] is untouched[0] and given["skips"][1] is untouched[1]
    assert given["recent"][1] is untouched[0] and given["memory"]["scale"] is untouched[2]
    assert given["memory"]["deep"] is deep
    assert torch.equal(module(x, **given), results[1])
    found, wanted = flat(list(given.values())), flat(list(expected.values()))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert given["recent"].maxlen == 2 and given["memory"]["steps"] == 5


def test_a_program_says_what_the_call_left() -> None:
    module, given = Takes().eval(), inputs()
    program = capture(module, (torch.ones(3, 4),), given)
    outcome = run_outcome(program, module, (torch.ones(3, 4),), given)
    assert isinstance(outcome, Outcome) and [each.number for each in outcome.left] == [1, 2, 4, 5]


def test_a_container_that_cannot_be_replaced_is_refused() -> None:
    class Own(dict):
        pass

    torch.utils._pytree.register_pytree_node(
        Own, lambda own: (list(own.values()), list(own)), lambda values, keys: Own(zip(keys, values, strict=True))
    )

    class Writes(nn.Module):
        def forward(self, x: torch.Tensor, own: dict) -> torch.Tensor:
            own["x"] = x
            return x + 1

    with pytest.raises(CaptureError, match="changes what a Own that it is given holds"):
        capture(Writes().eval(), (torch.ones(3),), {"own": Own()})


def test_a_list_that_changes_and_is_given_twice_is_refused() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, one: list, other: list) -> torch.Tensor:
            return x + one.pop() + len(other)

    module, shared = Twice().eval(), [torch.ones(3), torch.ones(3)]
    xdit_compile.parallelize(module, Plan(backend="eager"))
    with pytest.raises(CaptureError, match="given twice"):
        module(torch.ones(3), shared, shared)
    assert len(shared) == 2


class Keeps(nn.Module):
    """Writes what it computes to a part of a tensor that it is given, and reads the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, caches: list) -> tuple[torch.Tensor, list]:
        caches[0]["keys"][:, 1:3] = self.linear(x)
        return x + caches[0]["keys"].sum(1, keepdim=True) + caches[1], caches


def caches(draw: torch.Generator) -> list[Any]:
    return [{"keys": torch.randn(2, 5, 4, generator=draw)}, torch.randn(4, generator=draw)]


@pytest.mark.parametrize("inference", [False, True])
def test_tensors_that_the_caller_gave_hold_what_the_module_writes(inference: bool) -> None:
    module, draw = Keeps().eval(), torch.Generator().manual_seed(0)
    with torch.inference_mode(inference), torch.no_grad():
        given, x = caches(draw), torch.randn(2, 2, 4, generator=draw)
        expected, keys = copy.deepcopy(given), given[0]["keys"]
        results = [module(x * k, expected)[0] for k in (1, 2)]
        xdit_compile.parallelize(module, Plan(backend="eager"))
        for k, result in enumerate(results):
            torch.testing.assert_close(module(x * (k + 1), given)[0], result)
        assert given[0]["keys"] is keys
        torch.testing.assert_close(keys, expected[0]["keys"])


def test_tensors_that_are_written_to_and_share_memory_are_refused() -> None:
    module, draw = Keeps().eval(), torch.Generator().manual_seed(0)
    given, x = caches(draw), torch.randn(2, 2, 4, generator=draw)
    given[1] = given[0]["keys"][0, 1]
    xdit_compile.parallelize(module, Plan(backend="eager"))
    with pytest.raises(CaptureError, match="shares memory"):
        module(x, given)
