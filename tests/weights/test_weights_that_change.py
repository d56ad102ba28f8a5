"""Weights that change after slices were cut: right pictures, or a refusal in one line, never the old weights."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import procs
import pytest
import torch
import torch.distributed as dist
from commands import TINY_PIPELINE
from safetensors.torch import load_file, save, save_file
from splitting import worst_difference
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from zoo import transformers as zoo

import xdit_compile
from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.errors import AgreementError, CaptureError, UsageError
from xdit_compile.ir.program import Input, WeightSlice
from xdit_compile.ir.versions import version_of
from xdit_compile.weights.released import Refusals, released
from xdit_compile.weights.weights import Weights

HALF = (WeightSlice(0, ((0, 2),)),)
TENSOR = Plan(tensor=2, backend="eager")
KEEPING = Plan(tensor=2, backend="eager", keep_weights=True)


def stand_in() -> Any:
    return released(nn.Parameter(torch.randn(4, 3)), "proj.weight")


def set_data(parameter: Any) -> None:
    parameter.data = torch.zeros(4, 3)


def set_item(parameter: Any) -> None:
    parameter.data[0] = 0


USES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda p: p.copy_(torch.zeros(4, 3)),
    "add_": lambda p: p.add_(1),
    "data.add_": lambda p: p.data.add_(1),
    "detach.data.mul_": lambda p: p.detach().data.mul_(2),
    "data =": set_data,
    "data[0] =": set_item,
    "init": nn.init.zeros_,
    "foreach": lambda p: torch._foreach_add_([p], 1.0),
    "to": lambda p: p.to("cpu"),
    "half": lambda p: p.half(),
    "plus": lambda p: p + torch.zeros(4, 3),
    "into": lambda p: torch.zeros(4, 3).copy_(p),
    "linear": lambda p: nn.functional.linear(torch.zeros(1, 3), p),
    "iterate": list,
    "item": lambda p: p[0, 0].item(),
    "numpy": lambda p: p.detach().numpy(),
    "tolist": lambda p: p.tolist(),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda p: torch.save({"w": p.detach()}, io.BytesIO()),
    "safetensors": lambda p: save({"w": p.detach()}),
}


@pytest.mark.parametrize("use", USES)
def test_a_released_parameter_refuses_every_use_of_its_values(use: str) -> None:
    with pytest.raises(UsageError, match=r"^the values of proj.weight are not.*restore\(pipe\).*keep_weights=True.$"):
        USES[use](stand_in())


def test_a_released_parameter_tells_what_it_is() -> None:
    parameter = stand_in()
    assert isinstance(parameter, nn.Parameter) and parameter.is_meta and parameter.requires_grad
    assert (parameter.shape, parameter.dtype, parameter.device) == ((4, 3), torch.float32, torch.device("meta"))
    assert (parameter.numel(), parameter.dim(), parameter.stride(), len(parameter)) == (12, 2, (3, 1), 4)
    assert parameter.detach().shape == parameter.data.shape == torch.empty_like(parameter, device="meta").shape
    assert not parameter.requires_grad_(False).requires_grad and "proj.weight" in repr(parameter)
    for tensor in (parameter, parameter.detach()):
        assert FakeTensorMode().from_tensor(tensor, static_shapes=True).shape == (4, 3)


def half_released() -> tuple[nn.Module, Refusals]:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4)))
    module[1][0].weight = released(module[1][0].weight, "1.0.weight")
    refusals = Refusals()
    refusals.put_on(module)
    return module, refusals


WHOLES: dict[str, Callable[[nn.Module], Any]] = {
    "load_state_dict": lambda m: m.load_state_dict({"0.weight": torch.zeros(3, 3)}, strict=False),
    "load everything": lambda m: m.load_state_dict(
        nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4))).state_dict()
    ),  # fmt: skip
    "assign": lambda m: m.load_state_dict({"1.0.weight": torch.zeros(4, 3)}, strict=False, assign=True),
    "load inside": lambda m: m[1].load_state_dict({"0.bias": torch.zeros(4)}, strict=False),
    "load in a parent": lambda m: nn.ModuleList([m]).load_state_dict({"0.0.bias": torch.zeros(3)}, strict=False),
    "state_dict": lambda m: m.state_dict(),
    "state_dict inside": lambda m: m[1].state_dict(),
    "state_dict of a parent": lambda m: nn.ModuleList([m]).state_dict(),
    "half": lambda m: m.half(),
    "half inside": lambda m: m[1].half(),
    "to": lambda m: m.to("cpu"),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda m: torch.save(m, io.BytesIO()),
}


@pytest.mark.parametrize("use", WHOLES)
def test_a_module_with_released_parameters_refuses_before_it_changes_any(use: str) -> None:
    module, refusals = half_released()
    before = {name: each.clone() for name, each in module.named_parameters() if not each.is_meta}
    with pytest.raises(UsageError, match=r"^the values of 1.0.weight are not in the module .*restore\(pipe\)"):
        WHOLES[use](module)
    named = dict(module.named_parameters())
    assert all(torch.equal(named[name], each) and each.dtype == named[name].dtype for name, each in before.items())
    module[0].half().load_state_dict(nn.Linear(3, 3).half().state_dict())
    module[1][0].weight = nn.Parameter(torch.zeros(4, 3))
    WHOLES[use](module)
    refusals.take_off()
    assert "_apply" not in vars(module) and not module._state_dict_pre_hooks and not module._load_state_dict_pre_hooks


def test_writes_through_data_are_noticed_once_a_request() -> None:
    module = nn.Sequential(nn.Linear(7, 40), nn.Linear(40, 4), nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last))
    weights, names = Weights(module), [name for name, each in module.named_parameters() if each.dim() > 1]
    inputs = [Input(name, "parameter", name, HALF) for name in names]
    before = [weights.find(given) for given in inputs]
    weights.renew()
    assert all(weights.find(given) is kept for given, kept in zip(inputs, before, strict=True))
    for parameter in list(module.parameters())[2:]:
        parameter.data.add_(1)
    weights.renew()
    assert weights.find(inputs[0]) is before[0]
    assert all(torch.equal(weights.find(inputs[at]), before[at] + 1) for at in (1, 2))
    module[0].weight = nn.Parameter(module[0].weight.detach()[:, :3])
    weights.renew()
    assert torch.equal(weights.find(inputs[0]), module[0].weight[:2])


def test_tensors_of_inference_mode_have_no_version_and_are_sliced() -> None:
    with torch.inference_mode():
        module = nn.Linear(7, 4)
    assert version_of(module.weight) is None and version_of(torch.zeros(1)) == 0
    weights, given = Weights(module), Input("w", "parameter", "weight", HALF)
    before = weights.find(given)
    with torch.inference_mode():
        module.weight.add_(1)
        weights.renew()
    assert torch.equal(weights.find(given), before + 1) and not before.is_inference()


class Past(nn.Module):
    """Reaches a weight past its parameters, and with ``read`` makes a number of it."""

    def __init__(self, read: bool):
        super().__init__()
        self.linear, self.read = nn.Linear(3, 3), read
        self.held = [self.linear.weight]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = float(self.held[0][0, 0].detach()) if self.read else 1.0
        return x @ self.held[0] * scale


def test_no_constant_of_a_program_is_a_weight() -> None:
    program = capture(Past(read=False).eval(), (torch.randn(2, 3),), {})
    assert [given.target for given in program.inputs if given.kind != "user"] == ["linear.weight"]
    with pytest.raises(CaptureError, match="reads values"):
        capture(Past(read=True).eval(), (torch.randn(2, 3),), {})


def test_what_an_earlier_program_takes_whole_is_not_released() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    weights = Weights(module)
    earlier, later = (
        [Input(name, "parameter", name, pieces) for name in ("1.weight", "2.weight")] for pieces in ((), HALF)
    )
    weights.release([SimpleNamespace(parameters=lambda: earlier[:1])])  # type: ignore[list-item]
    weights.release([SimpleNamespace(parameters=lambda: later)])  # type: ignore[list-item]
    assert [name for name, each in module.named_parameters() if each.is_meta] == ["2.weight"]


# ---- two processes


Call = Callable[[nn.Module], list[Any]]


def twins() -> tuple[nn.Module, nn.Module, Call]:
    """A module, another one like it that stays unsplit, and a call of either."""
    case = zoo.MODELS["pixart"]
    args, kwargs = case.inputs()

    def call(module: nn.Module) -> list[Any]:
        with torch.no_grad():
            return pytree.tree_leaves(module(*args, **kwargs))

    return case.build(), case.build(), call


def linears(module: nn.Module) -> list[nn.Linear]:
    return [each for each in module.transformer_blocks.modules() if isinstance(each, nn.Linear)]


def other_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    named = module.state_dict().items()
    return {name: value * (1 + 0.2 * torch.randn(value.shape, generator=draw)) for name, value in named}


def fuse(module: nn.Module) -> None:
    """What fusing an adapter does: it writes through ``.data``, which raises no version."""
    draw = torch.Generator().manual_seed(2)
    for linear in linears(module):
        up, down = (torch.randn(size, 2, generator=draw) for size in linear.weight.shape)
        linear.weight.data += 0.1 * up @ down.t()


def replace_data(module: nn.Module) -> None:
    for linear in linears(module):
        linear.weight.data = linear.weight.data * 0.7


@torch.no_grad()
def write(module: nn.Module) -> None:
    for linear in linears(module):
        linear.weight.mul_(1.2)


def swap(module: nn.Module) -> None:
    """What hot-swapping an adapter does."""
    for linear in linears(module):
        torch.utils.swap_tensors(linear.weight, nn.Parameter(linear.weight.detach() * 0.8, requires_grad=False))


CHANGES: list[Callable[[nn.Module], Any]] = [
    lambda module: module.load_state_dict(other_weights(module)),
    fuse,
    replace_data,
    write,
    swap,
    lambda module: module.load_state_dict(other_weights(module), assign=True),
]


def run_kept(rank: int) -> tuple[list[float], list[float]]:
    """After each change: how far it moves the result, and how far the split module is from the unsplit one."""
    module, twin, call = twins()
    xdit_compile.parallelize(module, KEEPING)
    before, moved, worst = call(twin), [], [worst_difference(call(module), call(twin))]
    for at, change in enumerate(CHANGES):
        change(module)
        change(twin)
        expected = call(twin)
        with torch.inference_mode(at % 2 == 1):
            worst.append(worst_difference(call(module), expected))
        moved.append(worst_difference(expected, before))
        before = expected
    linears(module)[0].weight.data.view(-1)[1] += 5
    linears(twin)[0].weight.data.view(-1)[1] += 5
    worst.append(worst_difference(call(xdit_compile.refresh(module)), call(twin)))
    xdit_compile.restore(module)
    worst.append(worst_difference(call(module), call(twin)))
    return moved, worst


def test_kept_weights_may_change_in_any_way() -> None:
    for moved, worst in procs.run(run_kept, 2):
        assert min(moved) > 1e-3 and max(worst) <= 2e-5


def said(use: Callable[[], Any]) -> str:
    try:
        use()
    except UsageError as error:
        return str(error)
    return "nothing"


def run_released(rank: int, folder: str) -> tuple[list[str], list[float]]:
    module, twin, call = twins()
    xdit_compile.parallelize(module, TENSOR)
    expected = call(twin)
    with torch.inference_mode():
        worst = [worst_difference(call(module), expected)]
    given = other_weights(twin)
    uses = [
        lambda: module.load_state_dict(given), lambda: module.load_state_dict(given, assign=True),
        lambda: fuse(module), lambda: module.half(), module.state_dict, lambda: module.save_pretrained(folder),
        lambda: copy.deepcopy(module), lambda: xdit_compile.refresh(module),
    ]  # fmt: skip
    refused = [said(use) for use in uses]
    worst.append(worst_difference(call(module), expected))
    xdit_compile.restore(module)
    worst.append(worst_difference(call(module), expected))
    for each in (module, twin):
        each.load_state_dict(given)
        fuse(each)
    worst.append(worst_difference(call(xdit_compile.parallelize(module, TENSOR)), call(twin)))
    if rank:
        linears(module)[0].weight = nn.Parameter(linears(twin)[0].weight.detach())
    with pytest.raises(AgreementError, match="another set of released weights"):
        xdit_compile.restore(module)
    return refused, worst


def test_released_weights_are_changed_after_restore_and_not_before(tmp_path: Path) -> None:
    for refused, worst in procs.run(run_released, 2, str(tmp_path)):
        assert all("call xdit_compile.restore(pipe)" in message for message in refused), refused
        assert max(worst) <= 2e-5


class Adapted(nn.Module):
    """What adapters do: the linear moves one level down."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        torch.manual_seed(5)
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def adapt(module: nn.Module, device: str = "cpu") -> None:
    attention = module.transformer_blocks[0].attn1
    for name in ("to_q", "to_v"):
        made = Adapted(getattr(attention, name))
        made.up.to(device)
        made.down.to(device)
        setattr(attention, name, made)


def unadapt(module: nn.Module) -> None:
    attention = module.transformer_blocks[0].attn1
    attention.to_q, attention.to_v = attention.to_q.base, attention.to_v.base


def run_adapted(rank: int) -> tuple[list[float], list[str], int]:
    """Differences to the unsplit module, what is said of adapters without values, and parameters never given back."""
    worst, refused, lost = [], [], 0
    for plan in (TENSOR, Plan(ulysses=2, backend="eager")):
        for early in (True, False):
            module, twin, call = twins()
            plain = call(twin)
            adapt(twin)
            if early:
                adapt(module)
            xdit_compile.parallelize(module, plan)
            worst.append(worst_difference(call(module), call(twin) if early else plain))
            if not early:
                adapt(module)
            worst.append(worst_difference(call(module), call(twin)))
            unadapt(module)
            worst.append(worst_difference(call(module), plain))
            if plan.tensor > 1:
                adapt(module, "meta")
                refused += [said(lambda: call(module)), said(lambda: xdit_compile.restore(module))]  # noqa: B023
                unadapt(module)
                worst.append(worst_difference(call(module), plain))
            adapt(module)
            xdit_compile.restore(module)
            lost += sum(each.is_meta for each in module.parameters())
            worst.append(worst_difference(call(module), call(twin)))
    return worst, refused, lost


def test_adapters_come_and_go_before_and_after() -> None:
    for worst, refused, lost in procs.run(run_adapted, 2):
        assert max(worst) <= 2e-5 and not lost
        assert len(refused) == 4 and all("take the adapter off" in message for message in refused), refused


def picture(pipe: Any, size: int = 64) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    given = {"num_inference_steps": 2, "height": size, "width": size, "generator": generator, "output_type": "pt"}
    return pipe("a red circle", **given).images


def run_file_changes(rank: int, folder: str) -> tuple[list[str], torch.Tensor]:
    pipe = xdit_compile.from_pretrained(folder, TENSOR, torch_dtype=torch.float32)
    uses = [pipe.transformer.state_dict, lambda: pipe.save_pretrained(f"{folder}/copy{rank}")]
    refused = [said(use) for use in uses]
    picture(pipe)
    refused += [said(use) for use in uses]
    dist.barrier()
    if rank == 0:
        file = Path(folder, "transformer", "diffusion_pytorch_model.safetensors")
        save_file({name: value * 0.9 for name, value in load_file(file).items()}, f"{file}.new")
        Path(f"{file}.new").rename(file)
    dist.barrier()
    refused.append(said(lambda: xdit_compile.restore(pipe)))
    return refused, picture(xdit_compile.refresh(pipe))


def test_files_that_change_are_read_again_by_refresh_and_never_in_part(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = shutil.copytree(TINY_PIPELINE, tmp_path / "pipeline")
    found = procs.run(run_file_changes, 2, str(folder))
    expected = picture(DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32))
    for refused, made in found:
        assert all("xdit_compile.re" in message for message in refused), refused
        assert "was changed after" in refused[-1] and "xdit_compile.refresh(pipe)" in refused[-1]
        assert worst_difference(made, [expected]) <= 2e-5
