"""What a known call costs the host: nothing is read, walked or looked up that was before and has not changed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.distributed import distributed_c10d
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import transformers as zoo

import xdit_compile
import xdit_compile.kernels.attention  # noqa: F401 - registers its ops
from tests.capture.test_signature import CHANGES, Holder, counting
from xdit_compile import Plan
from xdit_compile.capture.interpret import bind
from xdit_compile.capture.state import unchanged
from xdit_compile.capture.state.unchanged import Watch
from xdit_compile.errors import AgreementError
from xdit_compile.ir.program import Input, Program, WeightSlice
from xdit_compile.ir.results import Template
from xdit_compile.kernels.attention_packages.installed import is_there
from xdit_compile.kernels.collectives.process_groups import Groups, process_group
from xdit_compile.weights.weights import Weights

aten = torch.ops.aten
READING = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
EAGER = Plan(backend="eager")


class Reads(TorchDispatchMode):
    """Counts the operators by which the host reads values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READING
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(owner: Any, name: str) -> Iterator[mock.Mock]:
    with mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)) as calls:
        yield calls


def stepping(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of another step: new latents and a new time, all else the same tensors."""
    return {**kwargs, **{name: kwargs[name].clone() for name in ("hidden_states", "timestep") if name in kwargs}}


@pytest.fixture
def flux() -> tuple[nn.Module, dict[str, Any]]:
    case = zoo.MODELS["flux"]
    args, kwargs = case.inputs()
    assert not args
    module = xdit_compile.parallelize(case.build(), EAGER)
    for _ in range(2):
        module(**stepping(kwargs))
    return module, kwargs


def test_a_known_call_reads_walks_and_looks_up_nothing(flux: tuple[nn.Module, dict[str, Any]]) -> None:
    module, kwargs = flux
    module(**stepping(kwargs))
    with Reads() as reads, counted(unchanged, "fingerprint") as walks, counted(Weights, "find") as finds:
        for _ in range(3):
            module(**stepping(kwargs))
    assert (reads.count, walks.call_count, finds.call_count) == (0, 0, 0)
    with counted(unchanged, "fingerprint") as walks, counted(Weights, "find") as finds, xdit_compile.generation(module):
        for _ in range(3):
            module(**stepping(kwargs))
    assert walks.call_count == 1, "all of a module is looked at once a request"
    (program,) = xdit_compile.api.runner_of(module).calls.latest.programs
    assert finds.call_count == len(dict(module.named_parameters())) + sum(bool(each.members) for each in program.inputs)


class Shortened(nn.Module):
    """Reads how many tokens count."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        return self.inner(x[:, : int(length.max())])


def test_guards_know_the_tensors_that_came_and_read_only_others() -> None:
    module, x = xdit_compile.parallelize(Shortened().eval(), EAGER), torch.randn(1, 5, 3)
    two, four = torch.tensor([2]), torch.tensor([4])

    def reads(*lengths: torch.Tensor) -> int:
        with Reads() as found:
            shapes = [module(x.clone(), length).shape[1] for length in lengths]
        assert shapes == [int(length) for length in lengths]
        return found.count

    reads(two, four, two, four)
    assert reads(two, four, two, four) == 0
    assert reads(torch.tensor([2])) <= 2, "a tensor that is made anew has to be read, by each program that may fit"
    two.fill_(3)
    assert reads(two) > 0


def test_where_packages_are_is_looked_up_once() -> None:
    is_there.cache_clear()
    q = torch.randn(1, 2, 8, 8)
    with mock.patch.object(importlib.util, "find_spec", return_value=None) as found:
        for _ in range(5):
            torch.ops.xdit_compile.attention_lse(q, q, q)
    assert found.call_count == len({call.args for call in found.call_args_list}) <= 2
    is_there.cache_clear()


def test_groups_are_made_once_and_anew_after_a_failure() -> None:
    made: list[Any] = []
    gloo = mock.Mock(**{"name.return_value": "gloo"})

    def make() -> dict[str, Any]:
        made.append(mock.Mock(_device_types=[torch.device("cpu")], **{"_get_backend.return_value": gloo}))
        return {"sequence": made[-1]}

    groups = Groups(make)
    groups.open()
    with groups.running(), mock.patch.object(distributed_c10d, "_resolve_process_group") as resolved:
        assert {id(process_group("sequence")) for _ in range(100)} == {id(made[0])}
        groups.close()
        with pytest.raises(AgreementError, match="closed after a failure"):
            process_group("sequence")
        groups.open()
        assert process_group("sequence") is made[1] and len(made) == 2
    assert not resolved.called


@pytest.mark.parametrize("said", CHANGES)
def test_a_watch_sees_what_signatures_do(said: str) -> None:
    module = zoo.MODELS["pixart"].build()
    look = Watch(module)
    assert look.same()
    CHANGES[said](module)
    assert not look.same()


class Slotted:
    """Keeps a list where no dict is."""

    __slots__ = ("kept",)

    def __init__(self) -> None:
        self.kept = [1]


DEEP: dict[str, Callable[[nn.Module], Any]] = {
    "a tensor in a dict is written to": lambda one: one.tables[7][0].add_(1),
    "a tensor is replaced by an equal one": lambda one: setattr(one, "table", one.table.clone()),
    "a dict has another entry": lambda one: one.tables.update({8: 1}),
    "an entry has another name": lambda one: one.tables.update({9: one.tables.pop(7)}),
    "a list in an object in an object grows": lambda one: one.holder.kept.kept.append(2),
    "an object has another attribute": lambda one: vars(one.plain).update(other=1),
    "a function has counted": lambda one: one.step(),
    "a slot holds another list": lambda one: setattr(one.slotted, "kept", [1]),
    "an array is written to": lambda one: one.array.__setitem__(0, 1.0),
    "a parameter has other data": lambda one: setattr(one.weight, "data", one.weight.data.double()),
    "a buffer is replaced": lambda one: one.register_buffer("held", one.held.clone()),
    "a buffer of one value is replaced": lambda one: one.register_buffer("scalar", torch.ones(())),
    "a method is patched": lambda one: setattr(one, "extra_repr", lambda: ""),
    "a flag is another": lambda one: setattr(one, "flag", False),
    "a child is gone": lambda one: delattr(one, "child"),
    "children change places": lambda one: one._modules.update(child=one.second, second=one.child),
}


@pytest.mark.parametrize("change", DEEP)
def test_a_watch_sees_what_hangs_on_modules_however_deep(change: str) -> None:
    one = nn.Linear(2, 2)
    one.table, one.tables = torch.ones(1), {7: [torch.ones(2)]}
    one.holder, one.plain, one.slotted = Holder(Holder([1])), type("Plain", (), {})(), Slotted()
    one.step, one.array, one.flag = counting(), np.zeros(2), True
    one.child, one.second = nn.Identity(), nn.Identity()
    one.register_buffer("held", torch.zeros(2))
    one.register_buffer("scalar", torch.ones(()))
    module = nn.Sequential(one)
    look = Watch(module)
    assert look.same() and look.same()
    DEEP[change](one)
    assert not look.same()
    assert Watch(module).same()


def test_a_watch_sees_that_a_class_computes_something_else() -> None:
    kind = type("Own", (nn.Sequential,), {})
    module = kind(nn.Identity())
    look = Watch(module)
    kind.forward = lambda self, x: x  # type: ignore[attr-defined]
    assert not look.same()


@torch.no_grad()
def test_what_changes_between_two_calls_of_a_request_is_followed() -> None:
    torch.manual_seed(0)
    one = nn.Linear(3, 3).eval()
    one.register_buffer("offset", torch.ones(3))
    one.scale = torch.ones(3)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = one

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.inner.scale + self.inner.offset

    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: setattr(one, "weight", nn.Parameter(one.weight * 2)),
        lambda: one.weight.mul_(2),
        lambda: setattr(one, "offset", one.offset * 3),
        lambda: one.offset.add_(1),
        lambda: setattr(one, "scale", one.scale * 2),
    ]
    module, x = xdit_compile.parallelize(Scaled().eval(), EAGER), torch.randn(2, 3)
    with xdit_compile.generation(module):
        for change in changes:
            change()
            for _ in range(2):
                expected = torch.nn.functional.linear(x, one.weight, one.bias) * one.scale + one.offset
                assert torch.allclose(module(x), expected)


@torch.no_grad()
def test_slices_are_bound_until_the_tensor_is_written_to_or_replaced() -> None:
    module = nn.Linear(2, 4)
    weights, given = Weights(module), Input("w", "parameter", "weight", (WeightSlice(0, ((1, 3),)),))
    graph = fx.Graph()
    graph.output((graph.placeholder("w"),))
    program = Program(fx.GraphModule({}, graph), (given,), {}, pytree.tree_structure(()), Template.of(()))

    def bound() -> torch.Tensor:
        (found,) = bind(program, weights, [])
        assert torch.equal(found, module.weight[1:3])
        return found

    assert bound() is bound(), "a slice is cut once"
    with counted(Weights, "find") as finds:
        weights.bindings.of_state(module)
        first = bound()
        assert bound() is first and finds.call_count == 1
        module.weight.mul_(2)
        assert bound() is not first and finds.call_count == 2
        module.weight.data.add_(1)
        weights.renew()
        bound()
        module.weight = nn.Parameter(torch.zeros(4, 2))
        weights.bindings.of_state(graph)
        bound()
