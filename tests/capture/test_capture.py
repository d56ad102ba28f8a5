"""A captured program computes what the module does, also for other inputs, and leaves the module as it was."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from zoo.transformers import MODELS

from xdit_compile.capture.capture import CAPTURE_METHODS, capture, compare, relative_difference
from xdit_compile.capture.interpret import run_outcome, run_program
from xdit_compile.errors import CaptureError
from xdit_compile.ir.program import Program

METHODS = dict(CAPTURE_METHODS)


def only(*names: str) -> Any:
    return tuple((name, METHODS[name]) for name in names)


def assert_well_formed(program: Program) -> None:
    """The contract of ``Program``: wiring only in the root, functional ATen with static fakes in the structures."""
    holders = program.root.graph.find_nodes(op="placeholder")
    assert [node.name for node in holders] == [spec.name for spec in program.inputs]
    assert all(node.users and isinstance(node.meta["val"], FakeTensor) for node in holders)
    assert {call.target for call in program.calls()} == set(program.structures())
    for call in program.calls():
        structure = program.structures()[str(call.target)]
        expected = [node.meta["val"].shape for node in structure.graph.find_nodes(op="placeholder")]
        assert [arg.meta["val"].shape for arg in call.args] == expected
        results = structure.graph.output_node().args[0]
        assert isinstance(results, tuple)
        assert [value.shape for value in call.meta["val"]] == [node.meta["val"].shape for node in results]
    for structure in program.structures().values():
        for node in structure.graph.nodes:
            if node.op == "output":
                continue
            assert node.op in ("placeholder", "call_function"), node.format_node()
            for value in pytree.tree_leaves(node.meta["val"]):
                assert isinstance(value, FakeTensor)
                assert all(type(size) is int for size in value.shape)
            schema = getattr(node.target, "_schema", None)
            assert schema is None or not schema.is_mutable, node.format_node()


def assert_same(program: Program, module: nn.Module, args: tuple, kwargs: dict) -> None:
    with torch.no_grad():
        expected = module(*args, **kwargs)
    found = run_program(program, module, args, kwargs)
    assert type(found) is type(expected)
    compare(found, expected)


IMAGES = ("flux", "sd3", "pixart", "hunyuandit", "dit", "sana", "zimage")
VIDEOS = ("cogvideox", "latte", "wan_t2v")


@pytest.mark.parametrize("name", IMAGES + VIDEOS)
def test_program_agrees_on_other_inputs(name: str) -> None:
    case = MODELS[name]
    module = case.build()
    program = capture(module, *case.inputs())
    assert_well_formed(program)
    assert not program.guards
    assert_same(program, module, *case.inputs(seed=5))


@pytest.mark.parametrize("name", ["lumina2_ragged", "mochi"])
def test_values_read_from_a_mask_become_guards(name: str) -> None:
    case = MODELS[name]
    module = case.build()
    args, kwargs = case.inputs()
    program = capture(module, args, kwargs)
    assert_well_formed(program)
    leaves = pytree.tree_leaves((args, kwargs))
    (guard,) = program.guards
    assert leaves[guard.position] is kwargs["encoder_attention_mask"]
    assert torch.equal(guard.value, kwargs["encoder_attention_mask"])
    assert_same(program, module, *case.inputs(seed=5))


@pytest.mark.parametrize("method", ["export", "dynamo"])
def test_each_method_gives_the_same_program(method: str) -> None:
    case = MODELS["pixart"]
    module = case.build()
    program = capture(module, *case.inputs(), methods=only(method))
    assert program.how == method
    assert_well_formed(program)
    assert_same(program, module, *case.inputs(seed=5))
    first = capture(module, *case.inputs(), methods=only("values"))
    assert [call.target for call in program.calls()] == [call.target for call in first.calls()]
    assert {spec.target for spec in program.inputs} == {spec.target for spec in first.inputs}


@dataclasses.dataclass
class Pair(BaseOutput):
    """A container as diffusers returns it."""

    first: torch.Tensor
    second: Any = None


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, batch: dict, scale: float = 1.0, return_dict: bool = True) -> Any:
        total = self.linear(batch["x"]) * scale + sum(batch["more"])
        rest = {"sum": total.sum(), "name": "sums", "same": batch["x"]}
        return Pair(total, rest) if return_dict else (total, [rest, None])


@pytest.mark.parametrize("return_dict", [True, False])
def test_containers_in_and_out(return_dict: bool) -> None:
    module = Containers().eval()

    def inputs(seed: int) -> tuple[tuple, dict]:
        generator = torch.Generator().manual_seed(seed)
        x, one, two = torch.randn(3, 4, 6, generator=generator).unbind()
        return ({"x": x, "more": [one, two]},), {"scale": 0.5, "return_dict": return_dict}

    program = capture(module, *inputs(0))
    assert_same(program, module, *inputs(1))
    result = run_program(program, module, *inputs(1))
    assert (result.second if return_dict else result[1][0])["name"] == "sums"
    assert isinstance(result, Pair) is return_dict


def test_only_used_inputs_are_listed() -> None:
    class Ignores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return self.used(c) + a

    program = capture(Ignores().eval(), (torch.randn(2, 3), torch.randn(2, 3)), {"c": torch.randn(2, 3)})
    assert {(spec.kind, spec.target) for spec in program.inputs} == {
        ("parameter", "used.weight"), ("parameter", "used.bias"), ("user", 0), ("user", 2),
    }  # fmt: skip


class Caching(nn.Module):
    """Keeps tensors wherever a module can: attribute, dict, list, plain object, memoised method and function."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)
        self.table: torch.Tensor | None = None
        self.last: torch.Tensor | None = None
        self.by_size: dict[int, torch.Tensor] = {}
        self.history: list[torch.Tensor] = []
        self.keeper = type("Keeper", (), {})()

    @functools.lru_cache  # noqa: B019
    def memoised(self, size: int) -> torch.Tensor:
        return torch.arange(size) * 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.arange(x.shape[-1]) / 3
        if x.shape[0] not in self.by_size:
            self.by_size[x.shape[0]] = torch.ones(x.shape[0], 1)
        self.last = x * 2
        self.history[:] = [x + 1]
        self.keeper.value = x - 1
        self.scale = self.scale.to(x.device)
        return x * self.table * self.by_size[x.shape[0]] + self.memoised(x.shape[-1]) * self.scale


def held_tensors(module: nn.Module) -> list[torch.Tensor]:
    holders = [vars(module), module._buffers, module.by_size, vars(module.keeper), {"memo": module.memoised(3)}]
    return [*module.history, *(v for holder in holders for v in holder.values() if isinstance(v, torch.Tensor))]


@pytest.mark.parametrize("method", ["values", "export", "dynamo"])
def test_module_holds_no_fakes_afterwards(method: str) -> None:
    module = Caching().eval()
    x = torch.randn(2, 3)
    expected = module(x)
    calls = len(module.history)
    try:
        capture(module, (x,), {}, methods=only(method))
    except CaptureError:
        assert method == "dynamo"
    held = held_tensors(module)
    assert len(held) > 6
    assert not any(isinstance(tensor, FakeTensor) for tensor in held)
    assert len(module.history) == calls
    assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.equal(module(x), expected)


def test_capture_draws_no_random_numbers() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 0 * torch.rand_like(x)

    module, x = Noisy().eval(), torch.randn(3)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    capture(module, (x,), {})
    assert torch.equal(torch.rand(1), expected)


def test_training_mode_is_refused_where_it_changes_what_is_computed() -> None:
    """A pipeline may build its denoiser itself, and leave it in training mode."""
    capture(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), (torch.randn(1, 2),), {})
    for module in (nn.Dropout(0.1), nn.BatchNorm1d(2)):
        with pytest.raises(CaptureError, match=r"call \.eval\(\)"):
            capture(nn.Sequential(nn.Linear(2, 2), module), (torch.randn(3, 2),), {})


def test_reasons_of_all_methods_are_listed() -> None:
    class ReadsWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y * int(y.sum().item() > 0)

    with pytest.raises(CaptureError) as caught:
        capture(ReadsWeights().eval(), (torch.randn(1, 2),), {})
    assert "values: " in str(caught.value) and "export: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_program_that_disagrees_is_refused() -> None:
    class CountsCalls(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            CountsCalls.calls += 1
            return x * CountsCalls.calls

    with pytest.raises(CaptureError, match="differs from the module's own"):
        capture(CountsCalls().eval(), (torch.randn(4),), {}, methods=only("values"))


def test_numbers_read_from_inputs_are_guarded_and_nothing_else() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor, lengths: torch.Tensor, flag: torch.Tensor, unread: torch.Tensor) -> Any:
            lengths = lengths * 2
            x = x[:, : int(lengths.max())]
            if flag.all():
                x = -x
            rows = torch.nonzero(lengths > 4)
            kept = unread[lengths > 4]
            return x, rows, kept, x[(lengths > 4).nonzero(as_tuple=True)]

    module = Reads().eval()
    lengths, flag = torch.tensor([1, 3, 3]), torch.tensor([True, True])
    program = capture(module, (torch.randn(3, 9), lengths, flag, torch.randn(3, 2)), {})
    assert program.how == "values"
    assert [guard.position for guard in program.guards] == [1, 2]
    assert_well_formed(program)
    assert_same(program, module, (torch.randn(3, 9), lengths, flag, torch.randn(3, 2)), {})


def test_whole_reads_are_answered() -> None:
    class ReadsAll(nn.Module):
        def forward(self, x: torch.Tensor, sizes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return torch.cat([part * i for i, part in enumerate(x.split(sizes.tolist()))]) * float(other.numpy()[0])

    module = ReadsAll().eval()
    sizes, other = torch.tensor([2, 1, 3]), torch.tensor([4.0])
    program = capture(module, (torch.randn(6, 2), sizes, other), {}, methods=only("values"))
    assert [guard.position for guard in program.guards] == [1, 2]
    assert_same(program, module, (torch.randn(6, 2), sizes, other), {})


def test_repeats_become_an_index() -> None:
    class Repeats(nn.Module):
        def forward(self, x: torch.Tensor, counts: torch.Tensor) -> Any:
            twice = x.repeat_interleave(2, dim=1)
            return twice, torch.repeat_interleave(x, counts, 0), x[0].repeat_interleave(counts[:1])

    module, counts = Repeats().eval(), torch.tensor([2, 0, 3])
    program = capture(module, (torch.randn(3, 2), counts), {}, methods=only("values"))
    assert [guard.position for guard in program.guards] == [1]
    assert_well_formed(program)
    assert_same(program, module, (torch.randn(3, 2), counts), {})


def test_places_given_as_tensors_are_numbers_that_are_guarded() -> None:
    class Cuts(nn.Module):
        def forward(self, x: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.sin().narrow(1, at[0], 2), *torch.tensor_split(x.cos(), at, 1)

    module, at = Cuts().eval(), torch.tensor([1, 3])
    program = capture(module, (torch.randn(2, 5), at), {}, methods=only("values"))
    assert [guard.position for guard in program.guards] == [1]
    assert_same(program, module, (torch.randn(2, 5), at), {})


def test_sizes_inside_whole_operators_are_guarded() -> None:
    class Repeats(nn.Module):
        def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.repeat_interleave.self_Tensor(x, counts, 0) * 2

    program = capture(Repeats().eval(), (torch.randn(2, 2), torch.tensor([2, 1])), {}, methods=only("values"))
    assert [guard.position for guard in program.guards] == [1]


def test_memoised_functions_forget_what_a_trace_gave_them() -> None:
    class Memoises(nn.Module):
        @functools.lru_cache  # noqa: B019
        def table(self, size: int) -> torch.Tensor:
            return torch.arange(size) * 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table(x.shape[-1])

    module = Memoises().eval()
    capture(module, (torch.randn(2, 3, device="meta"),), {}, methods=only("values"))
    assert not isinstance(module.table(3), FakeTensor)


def test_values_overwritten_by_unknown_ones_are_not_trusted() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = torch.zeros(2, 2)
            table[0] = self.linear(x)
            return table if table.sum() > 0 else -table

    with pytest.raises(CaptureError, match="reads values"):
        capture(Overwrites().eval(), (torch.randn(2),), {}, methods=only("values"))


def test_writes_to_inputs_leave_the_example_unharmed() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1) * 2

    x = torch.randn(3)
    before = x.clone()
    program = capture(Writes().eval(), (x,), {})
    assert torch.equal(x, before)
    outcome = run_outcome(program, Writes(), (x,), {})
    assert torch.equal(outcome.result, (before + 1) * 2) and torch.equal(outcome.written[0].values, before + 1)
    with pytest.raises(CaptureError, match="writes to"):
        capture(Writes().eval(), (x.to("meta"),), {})


def test_tensors_made_by_the_code_may_be_written_to() -> None:
    class Fills(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            table = torch.tensor([1.0, 2.0, 3.0])
            table[0] = x[1]
            return table * x

    module = Fills().eval()
    program = capture(module, (torch.randn(3),), {}, methods=only("values"))
    assert_well_formed(program)
    assert_same(program, module, (torch.randn(3),), {})
    assert_same(program, module, (torch.randn(3),), {})


def test_inputs_of_other_strides_are_taken() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1) * 2

    module = Views().eval()
    program = capture(module, (torch.randn(3, 4).t(),), {})
    assert_same(program, module, (torch.randn(4, 3),), {})
    assert_same(program, module, (torch.randn(3, 4).t(),), {})


def test_meta_module_keeps_the_values_it_was_given() -> None:
    case = MODELS["lumina2_ragged"]
    real = case.build()
    args, kwargs = case.inputs(device="meta")
    kwargs["encoder_attention_mask"] = case.inputs()[1]["encoder_attention_mask"]
    program = capture(case.build().to("meta"), args, kwargs)
    assert_well_formed(program)
    assert [guard.position for guard in program.guards]
    assert_same(program, real, *case.inputs())


def test_half_precision_agrees() -> None:
    case = MODELS["pixart"]
    module = case.build().to(torch.bfloat16)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(torch.bfloat16) if t.is_floating_point() else t, case.inputs()
    )
    program = capture(module, args, kwargs)
    assert_same(program, module, args, kwargs)


def test_autocast_switched_off_inside_is_inlined() -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                y = x.float() @ x.float().t()
            with torch.no_grad():
                return y.to(x.dtype) + 1

    for method in ("values", "export"):
        program = capture(Mixed().eval(), (torch.randn(3, 3),), {}, methods=only(method))
        assert_same(program, Mixed().eval(), (torch.randn(3, 3),), {})


def test_autocast_that_converts_is_refused_with_the_reason() -> None:
    class Casts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return x @ x

    with pytest.raises(CaptureError, match="autocast from torch.float32 to torch.bfloat16"):
        capture(Casts().eval(), (torch.randn(3, 3),), {}, methods=only("values"))


def test_relative_difference() -> None:
    one = torch.tensor([1.0, 2.0, float("inf"), float("nan")])
    assert relative_difference(one, one.clone()) == 0.0
    assert relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == pytest.approx(0.25)
    assert relative_difference(torch.tensor([1.0]), torch.tensor([0.0])) == float("inf")
    assert not relative_difference(torch.tensor([float("nan")]), torch.tensor([1.0])) <= 1.0


def hidden(memoised: Any) -> Any:
    """A wrapper that shows nothing of the memoised function in it."""

    @functools.wraps(memoised.__wrapped__)
    def call(*args: Any) -> Any:
        return memoised(*args)

    return call


class Tables(nn.Module):
    @hidden
    @functools.lru_cache  # noqa: B019 - as models have it
    def table(self, size: int) -> torch.Tensor:
        return torch.arange(float(size))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + self.table(x.shape[0]) + y.sum()


def test_a_memoised_table_of_one_trace_is_no_constant_of_the_next() -> None:
    """Where only traces run, nothing real fills the table before."""
    module, x = Tables().eval(), torch.randn(5)
    for y in (torch.randn(2), torch.randn(3)):
        program = capture(module, (x, y), {}, run=False)
        torch.testing.assert_close(run_program(program, module, (x, y), {}), x + torch.arange(5.0) + y.sum())
