"""Signatures are equal for equal calls, and notice whatever changes what a module computes."""

from __future__ import annotations

import collections
import functools
import gc
import io
import re
import time
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn
from zoo.transformers import MODELS

from xdit_compile.capture.state.signature import changes, kept, signature


class LowRank(nn.Module):
    """A linear layer with a low-rank update, put in place of the layer as adapter libraries do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def add_adapter(module: nn.Module) -> None:
    attention = module.transformer_blocks[1].attn1
    attention.to_q = LowRank(attention.to_q)


def replace_processor(module: nn.Module) -> None:
    module.transformer_blocks[0].attn1.set_processor(type("Other", (AttnProcessor2_0,), {})())


def add_hook(module: nn.Module) -> None:
    module.transformer_blocks[2].ff.register_forward_hook(lambda *unused: None)


def add_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *unused: None)


def patch_forward(module: nn.Module) -> None:
    module.proj_out.forward = lambda x: x


def replace_weight(module: nn.Module) -> None:
    module.proj_out.weight = nn.Parameter(module.proj_out.weight.detach().clone(), requires_grad=False)


def change_flag(module: nn.Module) -> None:
    module.transformer_blocks[0].attn1.scale *= 2


def train_one(module: nn.Module) -> None:
    module.transformer_blocks[0].attn1.train()


def remove_block(module: nn.Module) -> None:
    del module.transformer_blocks[1]


def resize_buffer(module: nn.Module) -> None:
    module.pos_embed.pos_embed = module.pos_embed.pos_embed[:, :-1].clone()


def change_processor_attribute(module: nn.Module) -> None:
    module.transformer_blocks[0].attn1.processor.scale = [0.5]


CHANGES = {
    "transformer_blocks.1.attn1.to_q": add_adapter,
    "transformer_blocks.0.attn1: processor": replace_processor,
    "transformer_blocks.2.ff: _forward_hooks": add_hook,
    r"\(root\): _forward_pre_hooks": add_pre_hook,
    "proj_out: forward": patch_forward,
    "proj_out: weight": replace_weight,
    "transformer_blocks.0.attn1: scale": change_flag,
    "transformer_blocks.0.attn1: its training flag": train_one,
    "transformer_blocks.2 is gone": remove_block,
    "pos_embed: pos_embed": resize_buffer,
    "attn1: processor": change_processor_attribute,
}


@pytest.mark.parametrize("said", CHANGES)
def test_changes_of_the_module_are_noticed_and_named(said: str) -> None:
    case = MODELS["pixart"]
    module = case.build()
    args, kwargs = case.inputs()
    before = signature(module, args, kwargs)
    CHANGES[said](module)
    after = signature(module, args, kwargs)
    assert before != after
    assert re.search(said, before.difference(after)), before.difference(after)


def test_equal_calls_have_equal_signatures_even_after_running() -> None:
    for name in ("flux", "latte", "zimage"):
        case = MODELS[name]
        module = case.build()
        before, after = (_after_running(module, case, seed) for seed in (0, 1))
        assert before == after, before.difference(after)
        assert hash(before) == hash(after)
        assert before.difference(after) == ""


def _after_running(module: nn.Module, case: Any, seed: int) -> Any:
    args, kwargs = case.inputs(seed=seed)
    with torch.no_grad():
        module(*args, **kwargs)
    return signature(module, *case.inputs(seed=seed))


Call = tuple[tuple, dict[str, Any]]


def other_shape(args: tuple, kwargs: dict) -> Call:
    return (torch.randn(1, 3), *args[1:]), kwargs


def other_dtype(args: tuple, kwargs: dict) -> Call:
    return (args[0].double(), *args[1:]), kwargs


def other_number(args: tuple, kwargs: dict) -> Call:
    return args, {**kwargs, "scale": 2.0}


def other_kind_of_number(args: tuple, kwargs: dict) -> Call:
    return args, {**kwargs, "scale": 1}


def none_for_tensor(args: tuple, kwargs: dict) -> Call:
    return (args[0], [None]), kwargs


def longer_list(args: tuple, kwargs: dict) -> Call:
    return (args[0], [*args[1], None]), kwargs


def other_device(args: tuple, kwargs: dict) -> Call:
    return (args[0].to("meta"), *args[1:]), kwargs


@pytest.mark.parametrize(
    "change",
    [other_shape, other_dtype, other_number, other_kind_of_number, none_for_tensor, longer_list, other_device],
)
def test_changes_of_the_inputs_are_noticed(change: Callable[[tuple, dict], Call]) -> None:
    module = nn.Linear(3, 3)
    call: Call = ((torch.randn(2, 3), [torch.ones(1)]), {"scale": 1.0})
    before, after = signature(module, *call), signature(module, *change(*call))
    assert before != after
    assert "input" in before.difference(after)
    assert before == signature(module, (torch.randn(2, 3), [torch.zeros(1)]), {"scale": 1.0})


def test_autocast_is_noticed() -> None:
    module, call = nn.Linear(2, 2), ((torch.ones(1, 2),), {})
    before = signature(module, *call)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in before.difference(signature(module, *call))


def test_patched_forward_of_the_root_does_not_count() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    before = signature(module, (), {})
    module.forward = lambda x: x
    assert before == signature(module, (), {})


class Holder:
    """A plain object that keeps things."""

    __slots__ = ("kept",)

    def __init__(self, kept: Any) -> None:
        self.kept = kept


def counting() -> Callable[[], int]:
    """A function with a counter in it."""
    count = 0

    def step() -> int:
        nonlocal count
        count += 1
        return count

    return step


def test_what_hangs_on_modules_counts_by_its_values_however_deep() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    step = counting()
    module[0].table, module[0].tables = torch.ones(3), {7: [torch.ones(2), (torch.ones(1), None)]}
    module[0].holder = Holder(Holder([collections.deque([1])]))
    module[0].step = functools.partial(step, *())
    numbers = module[0].numbers = np.zeros(2)

    def changed(change: Callable[[], Any]) -> str:
        before = signature(module, (), {})
        kept(before.modules)
        change()
        (said,) = changes(before.modules, signature(module, (), {}).modules).values() or [""]
        return said

    assert changed(lambda: setattr(module[0], "table", torch.ones(3))) == ""
    assert changed(lambda: setattr(module[0], "holder", Holder(Holder([collections.deque([1])])))) == ""
    assert changed(lambda: setattr(module[0], "table", torch.zeros(3))) == "table of 0"
    assert changed(lambda: module[0].table.add_(1)) == "table of 0"
    assert changed(lambda: module[0].tables[7][1][0].add_(1)) == "tables[7][1][0] of 0"
    assert changed(lambda: module[0].tables.update({8: torch.ones(1)})) == "tables[8] of 0"
    assert changed(lambda: module[0].holder.kept.kept[0].append(2)) == "holder.kept.kept[0][1] of 0"
    assert changed(step) == "step.func.count of 0"
    assert changed(lambda: numbers.__setitem__(0, 1.0)) == "numbers of 0"


def test_an_object_at_the_address_of_a_dead_one_is_another() -> None:
    class Processor(io.StringIO):
        """What it holds cannot be looked at."""

    module = nn.Linear(2, 2)
    for _ in range(1000):
        module.processor = Processor()
        address, taken = id(module.processor), signature(module, (), {})
        module.processor = None
        made = [Processor() for _ in range(100)]
        if again := [one for one in made if id(one) == address]:
            (module.processor,) = again
            assert signature(module, (), {}) != taken
            return
    pytest.fail("no address was used twice")


def test_signature_keeps_no_replaced_weights_alive() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    taken = signature(module, (), {})
    gone = weakref.ref(module[0])
    module[0] = nn.Linear(2, 2)
    gc.collect()
    assert gone() is None
    assert taken != signature(module, (), {})


def test_signature_of_a_large_model_is_fast() -> None:
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(guidance_embeds=True).eval()
    assert sum(1 for _ in module.modules()) > 1200
    times = []
    for _ in range(10):
        start = time.process_time()
        signature(module, (), {})
        times.append(time.process_time() - start)
    assert min(times) < 0.02
