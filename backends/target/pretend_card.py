"""A card that is not there: inductor generates code for it and Triton compiles that, on any machine; nothing is run."""

from __future__ import annotations

import contextlib
import dataclasses
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

DEVICE = torch.device("cuda", 0)


@dataclasses.dataclass(frozen=True)
class Card:
    """What is asked of a card, by the names that ``torch.cuda.get_device_properties`` has for it."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    shared_memory_per_block_optin: int
    regs_per_multiprocessor: int = 2**16
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32
    gcnArchName: str = ""

    @property
    def target(self) -> str:
        """The architecture that is compiled for."""
        return f"sm_{self.major}{self.minor}"


CARDS = {
    card.target: card
    for card in (
        Card("NVIDIA H100 80GB HBM3", 9, 0, 132, 227 * 2**10),
        Card("NVIDIA A100-SXM4-80GB", 8, 0, 108, 163 * 2**10),
        Card("NVIDIA B200", 10, 0, 148, 227 * 2**10),
        Card("NVIDIA GeForce RTX 5090", 12, 0, 170, 99 * 2**10, max_threads_per_multi_processor=1536),
    )
}


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
    from torch._inductor.utils import fresh_cache

    compiled: list[Binary] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_forget)
        for patch in patches(card, compiled):
            stack.enter_context(mock.patch.object(patch.owner, patch.name, patch.value, create=True))
        stack.enter_context(config.patch(SETTINGS))
        stack.enter_context(fresh_cache())
        _forget()
        yield compiled


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
    for name in REMEMBERED:
        pkgutil.resolve_name(name).cache_clear()
