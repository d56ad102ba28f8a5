"""Others who wrap, replace, compile or copy a module that is parallelized, before and after."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import accelerate.hooks
import diffusers
import pair
import pytest
import torch
from zoo.pipelines import PIPELINES

import xdit_compile
from xdit_compile import Plan
from xdit_compile.api import runner_of
from xdit_compile.errors import UsageError

PAIR = pair.Pair()
SD3 = PIPELINES["sd3"]
PLAN = Plan(ulysses=2, backend="eager", timeout_s=20)


@pytest.fixture(autouse=True, scope="module")
def end_the_pair() -> Iterator[None]:
    yield
    PAIR.end()


class Counting:
    """A hook that counts calls."""

    calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


class OfAccelerate(Counting, accelerate.hooks.ModelHook):
    def add(self, module: Any) -> None:
        accelerate.hooks.add_hook_to_module(module, self)

    def remove(self, module: Any) -> None:
        accelerate.hooks.remove_hook_from_module(module)


class OfDiffusers(Counting, diffusers.hooks.ModelHook):
    def add(self, module: Any) -> None:
        diffusers.hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(self, "counting")

    def remove(self, module: Any) -> None:
        module._diffusers_hook.remove_hook("counting")


def differs(memory: dict, pipe: Any) -> float:
    """The difference of a picture to one process's; two calls of the denoiser."""
    if "expected" not in memory:
        memory["expected"] = SD3.call(SD3.build())
    return ((SD3.call(pipe) - memory["expected"]).abs().max() / memory["expected"].abs().max()).item()


def split_work(pipe: Any) -> tuple[int, int]:
    """Programs of a denoiser, and the calls of the latest request."""
    runner = runner_of(getattr(pipe.transformer, "_orig_mod", pipe.transformer))
    return len(runner.calls), runner.session.agreement.calls


def hooked_before(rank: int, memory: dict, kind: type) -> None:
    pipe, hook = SD3.build(), kind()
    hook.add(pipe.transformer)
    own, found = type(pipe.transformer), pipe.transformer.forward
    xdit_compile.parallelize(pipe, PLAN)
    assert max(differs(memory, pipe), differs(memory, pipe)) <= 2e-5
    assert split_work(pipe) == (1, 2) and hook.calls == 4
    assert "2 ranks" in str(xdit_compile.explain(pipe))
    xdit_compile.restore(pipe)
    assert pipe.transformer.forward is found and type(pipe.transformer) is own
    assert differs(memory, pipe) == 0 and hook.calls == 6
    hook.remove(pipe.transformer)
    assert differs(memory, pipe) == 0 and hook.calls == 6


def hooked_after(rank: int, memory: dict, kind: type) -> None:
    pipe, hook = xdit_compile.parallelize(SD3.build(), PLAN), kind()
    hook.add(pipe.transformer)
    assert max(differs(memory, pipe), differs(memory, pipe)) <= 2e-5
    assert split_work(pipe) == (1, 2) and hook.calls == 4
    hook.remove(pipe.transformer)
    assert differs(memory, pipe) <= 2e-5 and split_work(pipe)[1] == 2 and hook.calls == 4
    hook.add(pipe.transformer)
    xdit_compile.restore(pipe)
    assert differs(memory, pipe) == 0 and hook.calls == 6


@pytest.mark.parametrize("kind", [OfAccelerate, OfDiffusers])
@pytest.mark.parametrize("play", [hooked_before, hooked_after])
def test_hooks_run_around_the_split_module(play: Callable[..., None], kind: type) -> None:
    PAIR.run(play, kind)


def compiled(rank: int, memory: dict) -> None:
    pipe = xdit_compile.parallelize(SD3.build(), PLAN)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert max(differs(memory, pipe), differs(memory, pipe)) <= 2e-5 and split_work(pipe) == (1, 2)
    pipe = SD3.build()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    xdit_compile.parallelize(pipe, PLAN)
    assert max(differs(memory, pipe), differs(memory, pipe)) <= 2e-5 and split_work(pipe) == (1, 2)
    xdit_compile.restore(pipe)
    assert isinstance(pipe.transformer, torch._dynamo.OptimizedModule) and differs(memory, pipe) <= 2e-5
    for first in (True, False):
        pipe = SD3.build()
        xdit_compile.parallelize(pipe, PLAN) if first else pipe.transformer.compile(backend="eager")
        pipe.transformer.compile(backend="eager") if first else xdit_compile.parallelize(pipe, PLAN)
        assert max(differs(memory, pipe), differs(memory, pipe)) <= 2e-5 and split_work(pipe) == (1, 2)


@pytest.mark.slow
def test_modules_that_are_compiled_as_well() -> None:
    PAIR.run(compiled)


def copied(rank: int, memory: dict) -> None:
    pipe = SD3.build()
    own = type(pipe), type(pipe.transformer)
    xdit_compile.parallelize(pipe, PLAN)
    assert differs(memory, pipe) <= 2e-5
    for twin in (copy.deepcopy(pipe), SD3.build()):
        assert (type(twin), type(twin.transformer)) == own and runner_of(twin.transformer) is None
    twin.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    assert type(twin.transformer) is own[1] and runner_of(twin.transformer) is None
    if rank == 0:
        assert differs(memory, copy.deepcopy(pipe)) == differs(memory, twin) == 0
    assert differs(memory, pipe) <= 2e-5 and split_work(pipe) == (1, 2)


def test_copies_are_unsplit() -> None:
    PAIR.run(copied)


def replaced(rank: int, memory: dict) -> None:
    pipe, own = SD3.build(), type(SD3.build().transformer).forward
    calls = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return tuple(2 * each for each in own(self, *args, **kwargs))

    pipe.transformer.forward = types.MethodType(forward, pipe.transformer)
    expected = SD3.call(pipe)
    xdit_compile.parallelize(pipe, PLAN)
    found = [SD3.call(pipe) for _ in range(2)]
    assert all((each - expected).abs().max() <= 2e-5 * expected.abs().max() for each in found)
    assert split_work(pipe) == (1, 2)
    xdit_compile.restore(pipe)
    assert vars(pipe.transformer)["forward"].__func__ is forward
    xdit_compile.parallelize(pipe, PLAN)
    assert torch.equal(SD3.call(copy.deepcopy(pipe)), expected)
    xdit_compile.restore(pipe)
    del pipe.transformer.forward
    xdit_compile.parallelize(pipe, PLAN)
    assert differs(memory, pipe) <= 2e-5
    pipe.transformer.forward = types.MethodType(forward, pipe.transformer)
    with pytest.raises(UsageError, match="transformer.forward was replaced after parallelize"):
        SD3.call(pipe)
    del pipe.transformer.forward
    assert differs(memory, pipe) <= 2e-5


def test_a_forward_replaced_before_is_split_and_after_refused() -> None:
    PAIR.run(replaced)
