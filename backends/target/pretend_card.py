"""A card that is not there: inductor generates code for it and Triton compiles that, on any machine; nothing is run.

Whatever is patched of torch and Triton to generate code for such a card, or to load it with another build of torch, is
in this file, for the versions of `KNOWN` alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from xdit_compile.errors import UsageError

from .cards import CARDS as CARDS
from .cards import Card

DEVICE = torch.device("cuda", 0)
KNOWN = {"torch": ("2.13",), "triton": ("3.7", "3.9")}
"""The versions whose insides were looked at."""
Configuration = dict[str, Any]
"""Sizes of blocks by their names in a kernel, its warps and stages."""


class Binary(NamedTuple):
    """Machine code that Triton handed over to be loaded: its kernel, its architecture, its size in bytes.

    A thread of it has so many registers, and so many bytes of memory for what does not fit into them.
    """

    kernel: str
    target: str
    size: int
    registers: int
    stack: int


class Patch(NamedTuple):
    """An attribute that has another value while the card is there, and why."""

    owner: Any
    name: str
    value: Any
    why: str


SETTINGS = {
    "joint_graph_constant_folding": False,  # constants are computed on the device; FLUX's code is the same without
    "compile_threads": 1,  # other processes would not have the patches
    "use_static_triton_launcher": False,  # it loads binaries by itself, in C++
    "shape_padding": False,  # whether a product is padded is found out by timing it
}
"""Inductor's settings while the card is there."""

NUMBERED = re.compile(r"((?:_DeviceGuard\(|\bset_device\(|\bget_raw_stream\(|type='cuda', index=))\d+")
"""Where inductor's code has the number of the card that it was made on."""
UNTIMED = {
    "triton.autotune_at_compile_time": False,
    "triton.autotune_pointwise": False,
    "dynamic_scale_rblock": False,
    "bundle_triton_into_fx_graph_cache": False,  # machine code is kept beside it
    "compile_threads": 1,
}
"""Further settings of code that is kept for a card: nothing of it is left to be tried out there."""

REMEMBERED = (
    "torch._dynamo.debug_utils:_cuda_system_info_comment",
    "torch._inductor.codecache:CacheBase.get_system",
    "torch._inductor.runtime.hints:DeviceProperties.create",
    "torch._inductor.utils:get_gpu_type",
    "torch.utils._triton:has_triton",
    "torch.utils._triton:triton_backend",
    "torch.utils._triton:triton_hash_with_backend",
    "triton.compiler.compiler:max_shared_mem",
)
"""Functions that keep what they were told of the card."""


@contextlib.contextmanager
def pretend_card(card: Card) -> Iterator[list[Binary]]:
    """Have torch and Triton compile for a card; everything is as it was when this is left.

    Yields:
        What Triton compiled so far.
    """
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.utils import fresh_cache

    check_versions()
    compiled: list[Binary] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        for patch in patches(card, compiled):
            stack.enter_context(mock.patch.object(patch.owner, patch.name, patch.value, create=True))
        decompositions = select_decomp_table()
        stack.enter_context(mock.patch.dict(decompositions, {torch.ops.aten.index_select.default: _index_select}))
        stack.enter_context(config.patch(SETTINGS))
        stack.enter_context(fresh_cache())
        _forget()
        yield compiled


def check_versions() -> None:
    """See that torch and Triton are those whose insides are patched here.

    Raises:
        UsageError: with the versions that are.
    """
    here = {name: importlib.metadata.version(name) for name in KNOWN} | {"torch": str(torch.__version__)}
    if not all(here[name].startswith(tuple(f"{each}." for each in versions)) for name, versions in KNOWN.items()):
        known = " and ".join(f"{name} {' or '.join(versions)}" for name, versions in KNOWN.items())
        found = " and ".join(f"{name} {version}" for name, version in here.items())
        raise UsageError(f"code for a card that is not there can be made with {known} alone; here are {found}")


@contextlib.contextmanager
def configured(chosen: dict[str, Configuration]) -> Iterator[None]:
    """Have each of inductor's Triton kernels compiled in one launch configuration, the same on all machines.

    Inductor compiles several of some kernels and times them on the card. Here the one that is chosen already is taken,
    else the first, which stands for what it expects to be best; that is noted then. Triton uses its own libdevice,
    which is part of its keys, and not that of whatever CUDA toolkit is there.

    Args:
        chosen: by the names of kernels.
    """
    from torch._inductor import async_compile
    from torch._inductor.runtime import triton_heuristics
    from triton import knobs

    check = triton_heuristics.check_autotune_cache

    def one(configs: list[Any], filename: str | None, meta: Any) -> Any:
        if len(configs) > 1:
            wanted = chosen.setdefault(meta["kernel_name"], _configuration(configs[0]))
            configs = [config for config in configs if _configuration(config) == wanted] or configs
        return check(configs, filename, meta)

    with (
        mock.patch.object(triton_heuristics, "check_autotune_cache", one),
        mock.patch.object(async_compile, "_set_triton_libdevice_path", lambda: None),
        knobs.nvidia.scope(),
    ):
        del knobs.nvidia.libdevice_path
        os.environ.pop("TRITON_LIBDEVICE_PATH", None)
        yield


def _configuration(config: Any) -> Configuration:
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


@contextlib.contextmanager
def on_current_card() -> Iterator[None]:
    """Have code that is loaded run on the current card, where inductor wrote the number of another one into it."""
    from torch._inductor.output_code import CompiledFxGraph

    load, number = CompiledFxGraph.after_deserialization, str(torch.cuda.current_device())

    def moved(graph: Any, constants: Any) -> Any:
        source = NUMBERED.sub(lambda match: match[1] + number, graph.source_code)
        if source != graph.source_code:
            graph.source_code, graph.cache_key = source, f"{graph.cache_key}_{number}"
        return load(graph, constants)

    with mock.patch.object(CompiledFxGraph, "after_deserialization", moved):
        yield


@contextlib.contextmanager
def kept_on_host() -> Iterator[None]:
    """Have tensors that are moved to a card stay where they are, as the card is not there."""
    to = torch.Tensor.to

    def stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        def here(value: Any) -> Any:
            return tensor.device if isinstance(value, torch.device) and value.type == DEVICE.type else value

        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            args, kwargs = tuple(map(here, args)), {name: here(value) for name, value in kwargs.items()}
        return to(tensor, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "to", stay):
        yield


def patches(card: Card, compiled: list[Binary]) -> list[Patch]:
    """Everything that stands in for the device; what is loaded is added to ``compiled``."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph
    from triton.runtime import driver

    trace = joint_graph.lazy_init
    exchange = staticmethod(_first)
    return [
        Patch(torch._C, "_cuda_getDeviceCount", lambda: 1, "by this torch.cuda knows that it has a device"),
        Patch(torch._C, "_cuda_getDevice", lambda: 0, "code is generated for the current device"),
        Patch(torch._C, "_cuda_getCurrentRawStream", _first, "generated code imports it to launch kernels on"),
        Patch(torch.cuda, "_lazy_init", lambda: None, "a build for the CPU refuses to initialise CUDA"),
        Patch(torch.cuda, "_get_device_properties", lambda index: card, "what kernels are tuned for; CUDA defines it"),
        Patch(torch.cuda, "_exchange_device", _first, "compiling begins by making the device the current one"),
        Patch(torch.cuda, "_maybe_exchange_device", _first, "and ends by going back"),
        Patch(CudaInterface, "exchange_device", exchange, "inductor's own reference to the same, for launchers"),
        Patch(CudaInterface, "maybe_exchange_device", exchange, "as before, on the way back"),
        Patch(torch.Tensor, "copy_", _copy, "inductor tries out writes to views; the method makes the device current"),
        Patch(torch.Tensor, "contiguous", _contiguous, "as before, where rows of a picture are repeated"),
        Patch(torch.cuda, "get_rng_state", _no_state, "tracing keeps the state of the device's generator"),
        Patch(torch.cuda, "set_rng_state", lambda state: None, "and restores it"),
        Patch(
            joint_graph, "lazy_init", lambda device=None: trace(torch.device("cpu")), "it traces patterns on the device"
        ),
        Patch(driver, "_active", _driver(compiled), "Triton asks its driver for the target, and has it load binaries"),
    ]


def _first(index: int) -> int:
    """The only device, or its default stream."""
    return 0


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """The operator itself."""
    return torch.ops.aten.copy_.default(target, source, non_blocking)


def _index_select(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    """What inductor takes it apart into, by the operator itself: ``tensor[..., index]`` makes the device current.

    That is no patch of ``Tensor.__getitem__``, which would stay: Python takes every tensor for a sequence from then on.
    """
    if tensor.ndim == 0 or index.ndim != 1:
        return NotImplemented
    before: list[torch.Tensor | None] = [None] * (dim % tensor.ndim)
    return torch.ops.aten.index.Tensor(tensor, [*before, index])


def _contiguous(
    tensor: torch.Tensor, *, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:  # fmt: skip
    """The operator itself."""
    made: torch.Tensor = torch.ops.aten.contiguous.default(tensor, memory_format=memory_format)
    return made


def _no_state(device: Any = None) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _driver(compiled: list[Binary]) -> Any:
    """Triton's own driver for CUDA, over a library that loads nothing; it asks torch for the device."""
    from triton.backends.driver import GPUDriver
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            GPUDriver.__init__(self)
            self.utils, self.launcher_cls = _Library(compiled), _launcher

    return Driver()


class _Library:
    """What Triton otherwise builds against the CUDA driver."""

    def __init__(self, compiled: list[Binary]):
        self._compiled = compiled

    def get_device_properties(self, index: int) -> dict[str, int]:
        properties: Any = torch.cuda.get_device_properties(index)
        return {"max_shared_mem": properties.shared_memory_per_block_optin}

    def load_binary(self, name: str, cubin: bytes, shared: int, index: int) -> tuple[None, None, int, int, int]:
        """No module, no function, registers and spills of a thread as if it had none, the most threads of a block."""
        self._compiled.append(Binary(name, _target(cubin), len(cubin), *_resources(cubin)))
        properties: Any = torch.cuda.get_device_properties(index)
        return None, None, 0, 0, properties.max_threads_per_block


def _launcher(source: Any, metadata: Any) -> Callable[..., None]:
    def launch(*args: Any) -> None:
        raise RuntimeError("nothing runs on a card that is not there")

    return launch


def _target(cubin: bytes) -> str:
    """The architecture that an ELF file of CUDA names in its flags; their layout changed with version 8 of its ABI."""
    if cubin[:4] != b"\x7fELF":
        raise ValueError("Triton compiled something that is no ELF file")
    flags, version = cubin[48:52], cubin[8]
    return f"sm_{flags[1 if version >= 8 else 0]}"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack and local memory, as Triton's cuobjdump reads them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _forget() -> None:
    from torch._dynamo.device_interface import caching_worker_device_properties

    caching_worker_device_properties.pop(DEVICE.type, None)
    for name in REMEMBERED:
        pkgutil.resolve_name(name).cache_clear()
