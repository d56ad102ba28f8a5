"""What a module keeps from call to call, or reads from outside, is found and refused, or the module runs whole."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pair
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn
from zoo.pipelines import PIPELINES

import xdit_compile
from xdit_compile import Plan
from xdit_compile.api import runner_of
from xdit_compile.errors import CaptureError, StateError, VerificationError

PAIR = pair.Pair()
EAGER = Plan(backend="eager")
UNSPLIT = Plan(backend="eager", fallback="unsplit")


@pytest.fixture(autouse=True, scope="module")
def end_the_pair() -> Iterator[None]:
    yield
    PAIR.end()


class Counting(AttnProcessor2_0):
    """Attends, and scales what it gives by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = type("Steps", (), {"step": 0})()

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.inner.step += 1
        return super().__call__(attn, hidden_states, *args, **kwargs) * (1 + 0.01 * self.inner.step)


def with_processor(module: nn.Module) -> None:
    module.set_attn_processor(Counting())


class Storing(AttnProcessor2_0):
    """Attends, and keeps what it was given for whoever looks."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.map = hidden_states * 2
        return super().__call__(attn, hidden_states, *args, **kwargs)


def with_store(module: nn.Module) -> None:
    module.transformer_blocks[0].attn1.set_processor(Storing())


def with_broadcast(module: nn.Module) -> None:
    steps = iter(range(1000))
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",), current_timestep_callback=lambda: next(steps),
    )  # fmt: skip
    module.enable_cache(config)


def with_first_block(module: nn.Module) -> None:
    module.enable_cache(FirstBlockCacheConfig(threshold=10.0))


def with_magnitudes(module: nn.Module) -> None:
    module.enable_cache(
        MagCacheConfig(threshold=10.0, num_inference_steps=4, mag_ratios=[1.0] * 4, retention_ratio=0.0)
    )


def with_closure(module: nn.Module) -> None:
    """A function put in the place of a block's forward that leaves out every second call."""
    own, calls, kept = module.transformer_blocks[0].forward, 0, None

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, kept
        calls += 1
        if calls % 2 or kept is None:
            kept = own(*args, **kwargs)
        return kept

    module.transformer_blocks[0].forward = forward


KEEPING = {
    "processor": ("pixart", with_processor, "inner.step"),
    "store": ("pixart", with_store, "processor.map of .* with the inputs"),
    "broadcast": ("flux", with_broadcast, "disable_cache"),
    "first block": ("flux", with_first_block, "disable_cache"),
    "magnitudes": ("flux", with_magnitudes, "disable_cache"),
    "closure": ("pixart", with_closure, "forward"),
}


@pytest.mark.parametrize("name", KEEPING)
def test_modules_that_keep_state_are_refused_by_name_or_run_whole(name: str) -> None:
    model, keep, said = KEEPING[name]
    case = PIPELINES[model]
    pipe, own = case.build(), case.build()
    for each in (pipe, own):
        keep(each.transformer)
    expected = [case.call(own), case.call(own)]
    xdit_compile.parallelize(pipe, EAGER)
    for _ in range(2):
        with pytest.raises(StateError, match=said):
            case.call(pipe)
    xdit_compile.restore(pipe)
    xdit_compile.parallelize(pipe, UNSPLIT)
    with pytest.warns(UserWarning, match="runs whole"):
        found = [case.call(pipe), case.call(pipe)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Tabled(nn.Module):
    """Keeps a table for the last size, and a bias as a plain attribute of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.inner.bias_of_others = torch.ones(3)
        self.table: torch.Tensor | None = None
        self.outside: Callable[[], float] = lambda: 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1]) / 3
        return self.inner(x) * self.table[:, None] * self.outside() + self.inner.bias_of_others


@pytest.fixture
def tabled() -> Iterator[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(0)
    own = Tabled().eval()
    module = Tabled().eval()
    module.load_state_dict(own.state_dict())
    yield xdit_compile.parallelize(module, EAGER), own


@torch.no_grad()
def differs(module: nn.Module, own: nn.Module, size: int = 4) -> float:
    x = torch.randn(1, size, 3)
    return (module(x) - own(x)).abs().max().item()


def test_tensors_kept_as_attributes_are_followed(tabled: tuple[nn.Module, nn.Module]) -> None:
    module, own = tabled
    assert max(differs(module, own), differs(module, own)) <= 2e-5
    for change in (lambda one: setattr(one.inner, "bias_of_others", torch.arange(3.0)),
                   lambda one: one.inner.bias_of_others.mul_(3)):  # fmt: skip
        change(module), change(own)
        assert max(differs(module, own), differs(module, own)) <= 2e-5
    assert len(runner_of(module).calls) == 3
    module.inner.bias_of_others = module.inner.bias_of_others.clone()
    assert differs(module, own) <= 2e-5 and len(runner_of(module).calls) == 3


def test_tables_of_the_last_size_are_captured_once_for_each_they_are_found_with(
    tabled: tuple[nn.Module, nn.Module],
) -> None:
    module, own = tabled
    for _ in range(4):
        assert max(differs(module, own, 4), differs(module, own, 5)) <= 2e-5
    assert len(runner_of(module).calls) == 3


def test_what_changes_from_call_to_call_of_a_request_is_named(tabled: tuple[nn.Module, nn.Module]) -> None:
    module, own = tabled
    for scale in (1.0, 2.0, 3.0, 4.0):
        module.inner.scale = own.inner.scale = scale
        assert differs(module, own) <= 2e-5
    with xdit_compile.generation(module), pytest.raises(StateError, match="scale of inner"):
        for scale in (5.0, 6.0, 7.0):
            module.inner.scale = scale
            module(torch.randn(1, 4, 3))
    assert differs(module, own) <= 2e-5


def test_what_is_read_from_outside_is_found_in_a_later_call(tabled: tuple[nn.Module, nn.Module]) -> None:
    module, _ = tabled
    module.outside = Outside.read
    Outside.value = 2.0
    with xdit_compile.generation(module), pytest.raises(VerificationError, match="stands outside"):
        for step in range(2):
            Outside.value = float(step)
            module(torch.randn(1, 4, 3))


class Outside:
    """A count that hangs on no module."""

    value = 1.0

    @staticmethod
    def read() -> float:
        return Outside.value


class Accumulating(nn.Module):
    """Skips its work while its input changes little, as TeaCache has it; keeps a count in a buffer and a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.kept: torch.Tensor | None = None
        self.since = torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.since += 1
        if self.kept is None or self.since.item() > 3:
            self.kept = self.linear(x) - x
            self.since.zero_()
        return x + self.kept


def test_a_refused_capture_leaves_the_module_as_it_was() -> None:
    module = xdit_compile.parallelize(Accumulating().eval(), EAGER)
    for _ in range(2):
        with pytest.raises(StateError, match="since"), torch.no_grad():
            module(torch.randn(1, 3))
        assert module.kept is None and module.since.item() == 0 and module.calls.item() == 0


class Scheduled(AttnProcessor2_0):
    """Attends, and scales what it gives by a step that stands in no module."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().__call__(attn, hidden_states, *args, **kwargs) * Outside.value


def counted_step(step: int, time: Any, latents: Any) -> None:
    Outside.value = 1.1 + 0.1 * step


PLANS = [Plan(backend="eager", **degree) for degree in ({"ulysses": 2}, {"tensor": 2}, {"cfg": 2}, {"distrifusion": 2})]


def on_two_ranks(rank: int, memory: dict) -> None:
    case = PIPELINES["pixart"]
    own = case.build()
    with_processor(own.transformer)
    expected = [case.call(own), case.call(own)]
    for plan in PLANS:
        pipe = case.build()
        with_processor(pipe.transformer)
        xdit_compile.parallelize(pipe, dataclasses.replace(plan, fallback="unsplit"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [case.call(pipe), case.call(pipe)]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), plan
        xdit_compile.restore(pipe)
        pipe.transformer.set_attn_processor(Scheduled())
        xdit_compile.parallelize(pipe, plan)
        Outside.value = 1.0
        with pytest.raises(VerificationError, match="stands outside"):
            case.call(pipe, steps=4, callback=counted_step, callback_steps=1)
        pipe.transformer.set_attn_processor(AttnProcessor2_0())
        case.call(pipe, steps=4)
        assert runner_of(pipe.transformer).weights.partial == (plan.tensor > 1)


@pytest.mark.slow
def test_ranks_run_whole_together_and_find_what_is_read_from_outside() -> None:
    PAIR.run(on_two_ranks)


class Cache:
    """Keeps what a module computed in an earlier call, as an argument of it."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []


class Remembering(nn.Module):
    def forward(self, x: torch.Tensor, cache: Cache, store: bool) -> torch.Tensor:
        if store:
            cache.kept.append(x)
        return x + sum(cache.kept)


def test_objects_that_are_given_are_followed_and_not_written_to() -> None:
    module = xdit_compile.parallelize(Remembering().eval(), EAGER)
    cache, x = Cache(), torch.ones(2, 3)
    with pytest.raises(CaptureError, match="changes an object that it is given in .Cache.kept"):
        module(x, cache, True)
    assert cache.kept == []
    for value in (1.0, 2.0):
        cache.kept = [x * value]
        assert torch.equal(module(x, cache, False), x * (1 + value))
    twin = Cache()
    twin.kept = [x * 2]
    assert torch.equal(module(x, twin, False), x * 3) and len(runner_of(module).calls) == 2
