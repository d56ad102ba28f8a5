"""Without memory for the module itself a smaller call is compared with it: right passes, wrong is found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import procs
import pytest
import torch
from splitting import captured, partition_all
from torch import nn
from torch.utils import _pytree as pytree

import xdit_compile
from xdit_compile import Plan
from xdit_compile.api import runner_of
from xdit_compile.capture.capture import capture
from xdit_compile.errors import NoRoomError, VerificationError
from xdit_compile.ir import peak_memory as memory
from xdit_compile.ir.peak_memory import free_bytes, if_room, release_unused, with_reserve
from xdit_compile.passes.axes.infer import infer
from xdit_compile.passes.lowering import attention as attention_lowering
from xdit_compile.passes.lowering import stale_attention as kept_attention
from xdit_compile.passes.rules.registry import rulebook
from xdit_compile.runtime.verify import room, smaller
from xdit_compile.runtime.verify.simulated_mesh import run_simulated
from xdit_compile.runtime.verify.verification import verify

TOKENS = 77
LEFT = 3
"""Tokens that are left, with `smaller.FEW` of 2."""


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: 1)
    monkeypatch.setattr(smaller, "FEW", 2)


SEEN: list[int] = []
"""The tokens of each real run of a module itself; nothing that hangs on it, where it would be state."""


class Attending(nn.Module):
    """Three heads that attend over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and not x.is_meta:
            SEEN.append(x.shape[1])
        parts = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


def model() -> tuple[nn.Module, torch.Tensor]:
    """A denoiser and what it is called with; its runs are noted in `SEEN`."""
    torch.manual_seed(0)
    SEEN.clear()
    return Attending().eval().requires_grad_(False), torch.randn(1, TOKENS, 12)


@pytest.mark.usefixtures("tight")
def test_a_smaller_call_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = model()
    expected = module(x)
    SEEN.clear()
    plan = Plan(patches=2, backend="eager")
    xdit_compile.parallelize(module, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(module(x), expected)
    assert SEEN and max(SEEN) <= LEFT and not runner_of(module).calls.latest.room
    xdit_compile.restore(module)
    own = kept_attention._Kept.local_operand
    monkeypatch.setattr(kept_attention._Kept, "local_operand", lambda self, operand: own(self, min(operand, 1)))
    xdit_compile.parallelize(module, plan)
    with pytest.raises(VerificationError, match="output 0 of the split program differs"):
        module(x)
    assert max(SEEN) <= LEFT


@pytest.mark.usefixtures("tight")
def test_what_cannot_be_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smaller, "FEW", 64)
    module, x = model()
    xdit_compile.parallelize(module, Plan(backend="eager"))
    with pytest.warns(UserWarning, match="the first call of module was not compared with the module itself.* no axis"):
        module(x)
    assert not SEEN


def split(rank: int) -> tuple[str, str, int]:
    """Ranks of which one has no memory: what a right split gives, what a wrong one, and the most tokens seen."""
    smaller.FEW = 2
    room.free_bytes = lambda device: None if rank else 1
    said = []
    for wrong in (False, True):
        if wrong:
            attention_lowering.Exchanged._mask = broken_mask
        module, x = model()
        xdit_compile.parallelize(module, Plan(ulysses=2, backend="eager", timeout_s=30))
        try:
            module(x)
            said.append("right")
        except VerificationError as error:
            said.append(str(error))
    return said[0], said[1], max(SEEN)


def broken_mask(self: Any) -> Any:
    alive = torch.ones(1, sum(self.exchange.key_lengths), dtype=torch.bool)
    alive[:, : self.exchange.key_lengths[0]] = False
    return self.local.constant(alive)


def test_ranks_with_other_memory_compare_the_same_call() -> None:
    for right, wrong, tokens in procs.run(split, 2):
        assert right == "right" and "differs from the unsplit one" in wrong and tokens <= LEFT


def test_what_is_found_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate may be wrong: a module that runs out of memory is not the end of a request, nor is its error kept."""
    monkeypatch.setattr(smaller, "FEW", 2)
    module, x = model()

    linear = module.qkv.forward

    def scarce(given: torch.Tensor) -> torch.Tensor:
        if type(given) is torch.Tensor and given.shape[1] > LEFT and not given.is_meta:
            raise torch.OutOfMemoryError("there are 3 bytes left")
        return linear(given)

    module.qkv.forward = scarce
    with pytest.raises(NoRoomError, match="no memory to run the module whole"):
        capture(module, (x,), {})
    xdit_compile.parallelize(module, Plan(backend="eager"))
    module(x)
    assert not runner_of(module).calls.latest.room and SEEN[-1] <= LEFT


class Accelerator(SimpleNamespace):
    """A stand-in for ``torch.accelerator`` with so many bytes free, reserved and allocated."""

    def __init__(self, free: int, reserved: int, allocated: int):
        self.emptied = 0
        super().__init__(
            get_memory_info=lambda device: (free, 10 * free),
            memory_reserved=lambda device: reserved,
            memory_allocated=lambda device: allocated,
            is_available=lambda: True,
            empty_cache=self._emptied,
        )

    def _emptied(self) -> None:
        self.emptied += 1


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    made = Accelerator(1000, 500, 200)
    monkeypatch.setattr(memory.torch, "accelerator", made)
    yield made


def test_free_memory_counts_what_the_allocator_keeps_unused(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = torch.device("cuda", 1)
    assert free_bytes(card) == 1300
    assert free_bytes(torch.device("meta")) is None and free_bytes(torch.device("cpu")) > 2**20
    assert with_reserve(8000, torch.device("cpu")) == 8000
    assert with_reserve(8000, card) == 9000 + memory.WORKSPACE
    accelerator.get_memory_info = None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 9000))
    assert free_bytes(card) == 1000
    del accelerator.memory_reserved
    assert free_bytes(card) is None


def test_a_computation_without_memory_gives_nothing(accelerator: Accelerator) -> None:
    def fails(error: Exception) -> Any:
        raise error

    words = "[enforce fail] DefaultCPUAllocator: can't allocate memory"
    for error in (torch.OutOfMemoryError("full"), MemoryError(), RuntimeError(words)):
        assert if_room(lambda error=error: fails(error), torch.device("cuda")) is None
    assert accelerator.emptied == 3
    with pytest.raises(RuntimeError, match="of another kind"):
        if_room(lambda: fails(RuntimeError("of another kind")), torch.device("cuda"))
    release_unused(torch.device("cpu"))
    assert accelerator.emptied == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "pixart", "sana", "latte", "wan_t2v", "unet_sd15", "zimage"])
def test_models_take_a_smaller_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary tables, ids and masks are cut with the picture."""
    monkeypatch.setattr(smaller, "FEW", 2)
    model = captured(name)
    args, kwargs = smaller.smaller(model.inference, model.args, model.kwargs, 2)
    with torch.no_grad():
        expected = pytree.tree_leaves(model.module(*args, **kwargs))
    assert 4 * sum(each.numel() for each in expected) < sum(each.numel() for each in model.expected)
    inference = infer(capture(model.module, args, kwargs), rulebook())
    programs = [rank.program for rank in partition_all(inference, Plan(ulysses=2))]
    for found in run_simulated(programs, model.module, args, kwargs):
        verify(found, expected)
