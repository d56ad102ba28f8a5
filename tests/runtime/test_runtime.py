"""Modules in real processes: the same numbers, one program per signature, and clear errors instead of hangs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import procs
import pytest
import torch
from splitting import worst_difference
from torch import nn
from torch.utils import _pytree as pytree
from zoo import transformers as zoo

import xdit_compile
from xdit_compile import Plan
from xdit_compile.api import runner_of
from xdit_compile.errors import AgreementError, PlanError, UsageError


def run_model(rank: int, name: str, plan: Plan) -> float:
    """Guidance ranks share the batch, or two calls where it cannot be split."""
    case = zoo.MODELS[name]
    module = case.build()
    args, kwargs = case.inputs()
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
    assert xdit_compile.parallelize(module, plan) is module
    found = [module(*args, **kwargs) for _ in range(4)]
    worst = max(worst_difference(one, expected) for one in found)
    xdit_compile.restore(module)
    assert runner_of(module) is None
    return worst


@pytest.mark.parametrize(
    "plan", [Plan(ulysses=2, backend="eager"), Plan(ring=2, backend="eager")], ids=["ulysses", "ring"]
)
@pytest.mark.parametrize("name", ["flux", "sana", "latte", "qwenimage_masked"])
def test_two_processes_give_what_one_gives(name: str, plan: Plan) -> None:
    assert max(procs.run(run_model, 2, name, plan)) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("dimension", ["ulysses", "ring", "tensor", "cfg"])
@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_every_model_in_two_processes(name: str, dimension: str) -> None:
    assert max(procs.run(run_model, 2, name, Plan(**{dimension: 2}, backend="eager"))) <= 2e-5


def test_usp_in_four_processes() -> None:
    assert max(procs.run(run_model, 4, "sd3", Plan(ulysses=2, ring=2, backend="eager"))) <= 2e-5


@pytest.mark.slow
def test_inductor_compiles_each_structure_once_and_dynamo_none() -> None:
    assert max(procs.run(compile_and_count, 2)) <= 2e-5


def compile_and_count(rank: int) -> float:
    from torch._dynamo.utils import counters

    counters.clear()
    with mock.patch.object(torch._inductor, "compile", wraps=torch._inductor.compile) as compiled:
        worst = run_model(rank, "dit", Plan(ulysses=2))
    assert 1 <= compiled.call_count <= 4
    assert not counters["stats"]["unique_graphs"]
    return worst


def small_module() -> tuple[nn.Module, tuple, dict]:
    case = zoo.MODELS["dit"]
    args, kwargs = case.inputs()
    return case.build(), args, kwargs


def test_one_process_and_a_plan_of_one_work_without_a_launcher() -> None:
    module, args, kwargs = small_module()
    expected = pytree.tree_leaves(module(*args, **kwargs))
    xdit_compile.parallelize(module, Plan(backend="eager"))
    assert worst_difference(module(*args, **kwargs), expected) <= 2e-5


def programs(module: nn.Module) -> int:
    return len(runner_of(module).calls)


def test_the_same_signature_is_captured_once_and_others_again() -> None:
    module, args, kwargs = small_module()
    xdit_compile.parallelize(module, Plan(backend="eager"))
    for _ in range(3):
        module(*args, **kwargs)
    assert programs(module) == 1
    module(args[0][:1], **{k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})
    assert programs(module) == 2
    module(*args, **{**kwargs, "return_dict": not kwargs.get("return_dict", True)})
    assert programs(module) == 3


def test_an_adapter_added_later_is_noticed() -> None:
    module, args, kwargs = small_module()
    xdit_compile.parallelize(module, Plan(backend="eager"))
    before = pytree.tree_leaves(module(*args, **kwargs))[0]
    linear = module.transformer_blocks[0].attn1.to_q
    module.transformer_blocks[0].attn1.to_q = Adapted(linear)
    after = pytree.tree_leaves(module(*args, **kwargs))[0]
    assert programs(module) == 2
    assert (before - after).abs().max() > 1e-4


class Adapted(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        torch.manual_seed(5)
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_a_hook_added_later_is_noticed() -> None:
    module, args, kwargs = small_module()
    xdit_compile.parallelize(module, Plan(backend="eager"))
    before = pytree.tree_leaves(module(*args, **kwargs))[0]
    module.transformer_blocks[1].register_forward_hook(lambda _m, _i, out: out * 0.5)
    after = pytree.tree_leaves(module(*args, **kwargs))[0]
    assert (before - after).abs().max() > 1e-4


def test_changed_weights_are_used() -> None:
    module, args, kwargs = small_module()
    xdit_compile.parallelize(module, Plan(backend="eager"))
    module(*args, **kwargs)
    with torch.no_grad():
        next(module.parameters()).mul_(1.5)
    found = pytree.tree_leaves(module(*args, **kwargs))
    assert programs(module) == 1
    xdit_compile.restore(module)
    assert worst_difference(module(*args, **kwargs), found) <= 2e-5


def other_inputs(rank: int) -> str:
    module, args, kwargs = small_module()
    xdit_compile.parallelize(module, Plan(ulysses=2, backend="eager", timeout_s=20))
    try:
        module(args[0] + rank, **kwargs)
    except AgreementError as error:
        return str(error)
    return "nothing"


def test_a_rank_with_other_inputs_stops_every_rank() -> None:
    for message in procs.run(other_inputs, 2):
        assert "another input" in message and "same seed" in message


def another_call_later(rank: int) -> str:
    module, args, kwargs = small_module()
    xdit_compile.parallelize(module, Plan(ulysses=2, backend="eager", timeout_s=10))
    module(*args, **kwargs)
    if rank == 1:
        return "left"
    try:
        module(args[0][:1], **{k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()})
    except AgreementError as error:
        return str(error)
    return "nothing"


def test_a_rank_that_left_is_noticed_in_time() -> None:
    waiting, left = procs.run(another_call_later, 2)
    assert left == "left" and "rank 1 did not answer" in waiting


def other_plan(rank: int) -> str:
    module, args, kwargs = small_module()
    xdit_compile.parallelize(
        module, Plan(ulysses=2, backend="eager", attention=["sdpa", "sdpa_flash"][rank], timeout_s=20)
    )
    try:
        module(*args, **kwargs)
    except AgreementError as error:
        return str(error)
    return "nothing"


def test_a_rank_with_another_plan_stops_every_rank() -> None:
    for message in procs.run(other_plan, 2):
        assert "another plan" in message


def wrong_world(rank: int) -> str:
    module, _, _ = small_module()
    try:
        xdit_compile.parallelize(module, Plan(ulysses=3))
    except PlanError as error:
        return str(error)
    return "nothing"


def test_degrees_that_do_not_fit_the_world_are_refused() -> None:
    assert all("needs 3 processes but 2 are running" in message for message in procs.run(wrong_world, 2))


def test_refusals_say_what_to_do() -> None:
    module, _, _ = small_module()
    with pytest.raises(UsageError, match="was not parallelized"):
        xdit_compile.restore(module)
    xdit_compile.parallelize(module, Plan(backend="eager"))
    with pytest.raises(UsageError, match="restore first"):
        xdit_compile.parallelize(module, Plan(backend="eager"))
    with pytest.raises(UsageError, match="call the pipeline once"):
        xdit_compile.explain(module)
    with pytest.raises(UsageError, match="neither a diffusers pipeline nor a module"):
        xdit_compile.parallelize(object(), Plan())


def test_a_wrong_split_is_caught_by_verification(monkeypatch: Any) -> None:
    assert all("differs from the unsplit one" in message for message in procs.run(broken_merge, 2))


def broken_merge(rank: int) -> str:
    from xdit_compile.errors import XditCompileError
    from xdit_compile.passes.lowering import attention as attention_lowering

    def without_first_rank(self: Any) -> None:
        lengths = self.exchange.key_lengths
        keys = sum(lengths)
        alive = torch.ones(1, keys, dtype=torch.bool)
        alive[:, : lengths[0]] = False
        return self.local.constant(alive)

    attention_lowering.Exchanged._mask = without_first_rank
    module, args, kwargs = small_module()
    xdit_compile.parallelize(module, Plan(ulysses=2, backend="eager", timeout_s=20))
    try:
        module(*args, **kwargs)
    except XditCompileError as error:
        return str(error)
    return "nothing"


def test_a_hook_of_accelerate_runs_around_every_call() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        before = after = 0

        def pre_forward(self, module, *args, **kwargs):
            self.before += 1
            return args, kwargs

        def post_forward(self, module, output):
            self.after += 1
            return output

    case = zoo.MODELS["pixart"]
    module = case.build()
    args, kwargs = case.inputs()
    with torch.no_grad():
        expected = pytree.tree_leaves(module(*args, **kwargs))
    hook = Counting()
    add_hook_to_module(module, hook)
    hooked = module.forward
    xdit_compile.parallelize(module, Plan(backend="eager"))
    for _ in range(3):
        assert worst_difference(module(*args, **kwargs), expected) <= 2e-5
    assert hook.before == hook.after == 3
    xdit_compile.restore(module)
    assert module.forward is hooked
