"""Weights that a library wraps or moves are refused by name before anything runs, or the module runs whole."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear
from optimum.quanto import freeze, qint8, quantize
from torch import nn
from zoo.transformers import MODELS

import xdit_compile
from xdit_compile import Plan
from xdit_compile.capture.capture import capture
from xdit_compile.capture.state.unsupported import refuse_draws
from xdit_compile.errors import UnsupportedError

CPU = torch.device("cpu")


def quanto(module: nn.Module) -> None:
    quantize(module, weights=qint8)
    freeze(module)


def gguf_weights(module: nn.Module) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear) and child.in_features % 32 == 0:
            values = torch.from_numpy(gguf.quantize(child.weight.detach().numpy(), kind))
            packed[f"{name}.weight"] = GGUFParameter(values, quant_type=kind)
            child.bias = nn.Parameter(child.bias.detach(), requires_grad=False)
    biases = {name: bias for name, bias in module.named_parameters() if name.endswith("bias")}
    _replace_with_gguf_linear(module, torch.float32, packed)
    for name, weight in packed.items():
        path = name.removesuffix(".weight")
        module.get_submodule(path)._parameters.update(weight=weight, bias=biases[f"{path}.bias"])


def casting(module: nn.Module) -> None:
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def groups(module: nn.Module) -> None:
    apply_group_offloading(module, CPU, CPU, "block_level", num_blocks_per_group=1)


def leaves(module: nn.Module) -> None:
    apply_group_offloading(module, CPU, CPU, "leaf_level")


def one_by_one(module: nn.Module) -> None:
    cpu_offload(module, CPU)


FEATURES = {
    quanto: "QBytesTensor of optimum",
    gguf_weights: "GGUFParameter of diffusers",
    casting: "layerwise casting",
    groups: "group offload",
    leaves: "group offload",
    one_by_one: "sequential offload",
}


@pytest.mark.parametrize("put_on", FEATURES)
def test_what_libraries_do_to_weights_is_refused_by_name_or_runs_whole(put_on: Callable[[nn.Module], None]) -> None:
    case = MODELS["flux"]
    module, later = case.build(), case.build()
    put_on(module)
    with pytest.raises(UnsupportedError, match=FEATURES[put_on]):
        xdit_compile.parallelize(module, Plan(backend="eager"))
    args, kwargs = case.inputs()
    xdit_compile.parallelize(later, Plan(backend="eager"))
    put_on(later)
    with pytest.raises(UnsupportedError, match=FEATURES[put_on]), torch.no_grad():
        later(*args, **kwargs)
    with torch.no_grad():
        expected = module(*args, **kwargs)
    xdit_compile.parallelize(module, Plan(backend="eager", fallback="unsplit"))
    with pytest.warns(UserWarning, match="runs whole"), torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(module(*args, **kwargs), expected, strict=True))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + torch.randn_like(x))


def test_random_numbers_inside_of_a_denoiser_are_named() -> None:
    program = capture(Noisy().eval(), (torch.randn(1, 6, 4),), {})
    with pytest.raises(UnsupportedError, match="draws random numbers itself .randn"):
        refuse_draws(program)
    case = MODELS["flux"]
    args, kwargs = case.inputs()
    refuse_draws(capture(case.build(), args, kwargs))
