"""How much memory a request takes, counted from configurations alone, before any weights are read.

The pipeline runs with stand-ins in the place of its modules. What its denoisers and its autoencoder are called with is
seen, and each such call is traced on tensors without memory; its greatest number of live bytes is what the call takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from xdit_compile.cli.options.plenty import PROCESS
from xdit_compile.cli.options.request import Request
from xdit_compile.errors import XditCompileError, one_line
from xdit_compile.ir.peak_memory import LiveStorages, with_reserve
from xdit_compile.plan import Plan
from xdit_compile.weights.model_folder import pixel_multiple

from .repeats import prepared
from .stand_ins import Unvalued, components, configuration_folder, may_denoise, on_device, one_zero, pipeline_class
from .stand_ins import stand_in as stand_in_for

LARGEST = {"height": 2048, "width": 2048, "num_frames": 129, "num_images_per_prompt": 2}
"""What is traced at most: beyond, what a call takes is taken to grow as the number of pixels does."""
MOST_PROMPTS = 2
STRIPS = (2, 3)
"""An autoencoder in strips of rows still takes this part of its memory (docs/plans.md)."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a pipeline's parts take on one device that does all, in bytes.

    Args:
        weights: of each component that has any.
        denoisers: names of those among them.
        denoising: the most that a call of a denoiser makes.
        decoding: the most that the autoencoder makes; 0 where it is not called.
    """

    weights: dict[str, int]
    denoisers: frozenset[str]
    denoising: int
    decoding: int


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that one rank takes on a device: weights, and beside them what computes at one time."""

    weights: int
    denoiser: int
    autoencoder: int
    process: int = 0

    @property
    def total(self) -> int:
        """All of it: denoiser and autoencoder follow one another."""
        return self.process + self.weights + max(self.denoiser, self.autoencoder)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "denoiser": self.denoiser, "decode": self.autoencoder}
        return ", ".join(f"{name} {gibibytes(count)}" for name, count in parts.items())


def gibibytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def counted(request: Request, dtype: torch.dtype) -> Counts:
    """Count what a request's pipeline takes. Reads no weights and makes no large tensor.

    Args:
        dtype: of the weights.

    Raises:
        XditCompileError: the pipeline does not run without weights, or its model cannot be fetched.
    """
    folder = configuration_folder(request)
    traced, times = _reduced(request, pixel_multiple(folder) or 16)
    modules, others = components(folder, dtype)
    weights = {name: sum(each.nbytes for each in module.parameters()) for name, module in modules.items()}
    rehearsal = _Rehearsal(modules)
    rehearsal.run(pipeline_class(folder), others, traced)
    denoisers = frozenset(name for name, module in modules.items() if may_denoise(module))
    return Counts(weights, denoisers, int(rehearsal.denoising * times), int(rehearsal.decoding * times))


def _reduced(request: Request, multiple: int) -> tuple[Request, float]:
    """A request of a size that is quickly prepared, and how many times as many pixels were asked for."""
    smaller: dict[str, Any] = {}
    times = 1.0
    for name, most in LARGEST.items():
        value = getattr(request, name)
        if value is not None and value > most:
            smaller[name] = most // multiple * multiple if name in ("height", "width") else most
            times *= value / smaller[name]
    if len(request.prompt) > MOST_PROMPTS:
        smaller["prompt"], times = request.prompt[:MOST_PROMPTS], times * len(request.prompt) / MOST_PROMPTS
    return dataclasses.replace(request, num_inference_steps=2, **smaller), times


class _Decoded(BaseException):
    """Leaves the pipeline where it decodes; no ``except Exception`` on the way catches it."""


class _Rehearsal:
    """A pipeline whose modules compute nothing, and what their calls would take."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.denoising = self.decoding = 0
        self._known: dict[Any, Any] = {}

    def run(self, kind: Any, others: dict[str, Any], request: Request) -> None:
        """Call the pipeline up to its first decoding.

        Raises:
            XditCompileError: it does not get there.
        """
        for name in ("enable_tiling", "enable_slicing"):
            for module in self.modules.values() if getattr(request, name) else ():
                getattr(module, name, lambda: None)()
        stand_ins: dict[str, Any] = {name: stand_in_for(module) for name, module in self.modules.items()}
        for name, module in self.modules.items():
            if may_denoise(module):
                stand_ins[name].forward = self._denoises(module)
            elif callable(getattr(module, "decode", None)):
                stand_ins[name].decode = self._decodes(module)
        pipe = kind(**others, **stand_ins)
        pipe.set_progress_bar_config(disable=True)
        arguments, _ = prepared(pipe, request)
        if "generator" in arguments:
            arguments["generator"] = torch.Generator()
        try:
            with torch.no_grad(), Unvalued():
                pipe(**arguments)
        except _Decoded:
            pass
        except Exception as error:
            raise XditCompileError(f"the pipeline does not run without weights: {one_line(error)}") from error

    def _denoises(self, module: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            form = [(each.shape, each.dtype) if isinstance(each, torch.Tensor) else repr(each) for each in leaves]
            key = (id(module), str(spec), str(form))
            if key not in self._known:
                peak, self._known[key] = traced(module, module.forward, args, kwargs)
                self.denoising = max(self.denoising, peak)
            return self._known[key]

        return forward

    def _decodes(self, module: nn.Module) -> Callable[..., Any]:
        def decode(*args: Any, **kwargs: Any) -> Any:
            self.decoding = traced(module, getattr(module, "decode"), args, kwargs)[0]  # noqa: B009
            raise _Decoded

        return decode


def traced(module: nn.Module, call: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[int, Any]:
    """The greatest number of bytes that a call of a module makes at one time, and its result as zeros without memory.

    Args:
        module: its parameters may be on the meta device; nothing is computed, and all of them are replaced.
        call: one of its methods.
    """
    args, kwargs = on_device("meta", (args, kwargs))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _disable_current_modes(), mode, torch.no_grad():
        for child in module.modules():
            _without_memory(child._parameters, lambda value: nn.Parameter(_fake(value), requires_grad=False))
            _without_memory(child._buffers, _fake)
        args, kwargs = pytree.tree_map_only(torch.Tensor, _fake, (args, kwargs))
        with _WithWorkspaces() as storages:
            result = call(*args, **kwargs)
    with _disable_current_modes():
        return storages.peak, pytree.tree_map_only(torch.Tensor, one_zero, result)


def _without_memory(values: dict[str, Any], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for name, value in values.items():
        if value is not None:
            values[name] = make(value)


def _fake(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")


class _WithWorkspaces(LiveStorages):
    """Counts beside each convolution its operand and result once more: libraries compute in a layout of their own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if "conv" in func.__name__ and isinstance(result, torch.Tensor):
            self.peak = max(self.peak, self.live + args[0].nbytes + result.nbytes)
        return result


def need(counts: Counts, request: Request, device: torch.device) -> Need:
    """What one rank of a request's plan takes on its device."""
    plan = request.plan
    weights = {
        name: count // plan.tensor if name in counts.denoisers else count for name, count in counts.weights.items()
    }
    resident = sum(weights.values())
    if request.enable_model_cpu_offload:
        resident = max(weights.values(), default=0)
    elif request.enable_sequential_cpu_offload:
        resident = 0
    denoising = counts.denoising // (plan.world_size // plan.tensor // plan.pipefusion)
    decoding = _decoding(counts.decoding, plan)
    process = PROCESS if device.type == "cpu" else 0
    return Need(resident, with_reserve(denoising, device), with_reserve(decoding, device), process)


def _decoding(count: int, plan: Plan) -> int:
    """What the autoencoder takes on one rank: its rows, and of those strips where that is asked for."""
    if plan.vae == "whole":
        return count
    share = count // (plan.rows.ring * plan.data)
    return share if plan.vae_bytes is None else min(share, max(plan.vae_bytes, share * STRIPS[0] // STRIPS[1]))


def to_load(counts: Counts, request: Request) -> int:
    """Bytes of RAM that a rank takes to bring weights to an accelerator: they are read whole, but for slices."""
    sliced = counts.denoisers if request.plan.tensor > 1 else frozenset()
    return PROCESS + sum(count for name, count in counts.weights.items() if name not in sliced)
