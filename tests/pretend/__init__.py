"""A pretend accelerator with several devices, on a machine that has none: `start` registers it with PyTorch.

Its tensors lie in host memory and compute on the CPU, but as far as programs see they lie on devices of type
``pretend``. It refuses operators over tensors of two devices as CUDA does (0-dim tensors of the CPU alone are exempt),
counts every read of a value by the host, and counts operators by device. Made for processes of their own: a device type
cannot be taken back.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from filelock import FileLock

NAME = "pretend"
LIBRARY = "pretend_device"
BUILD_S = 300
"""How long a process waits for another's build."""
BACKEND = "pccl"
"""Collectives of its tensors: gloo's, over the same bytes."""
BACKENDS = {NAME: f"cpu:gloo,{NAME}:{BACKEND}"}
"""What `torch.distributed.init_process_group` is asked for, by type of device."""


def unavailable() -> str | None:
    """Why there can be no such device here."""
    return None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "the pretend device needs a C++ compiler"


@functools.cache
def extension() -> Any:
    """The device in C++, compiled once for each state of its source.

    Each build has a folder of its own: what a killed one leaves, PyTorch's lock among it, stops no other.
    """
    source = Path(__file__).with_name("device.cpp")
    state = hashlib.sha256(source.read_bytes() + torch.__version__.encode() + sys.version.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"pretend-device-{os.getuid()}-{state}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{LIBRARY}.so"
    with FileLock(folder / "one-at-a-time", timeout=BUILD_S):
        return _imported(library) if library.exists() else _compiled(source, library)


def _compiled(source: Path, library: Path) -> Any:
    from torch.utils.cpp_extension import load

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory(dir=library.parent) as build, mock.patch.dict(os.environ, PATH=path):
        module = load(LIBRARY, [str(source)], extra_cflags=["-O1"], build_directory=build)
        Path(build, library.name).replace(library)
    return module


def _imported(library: Path) -> Any:
    spec = importlib.util.spec_from_file_location(LIBRARY, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def start(devices: int = 2) -> Any:
    """Make ``torch.pretend`` and the device type; returns the extension, whose counts can be read."""
    device = extension()
    device.start(devices)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(device))
    torch.utils.generate_methods_for_privateuse1_backend()
    dist.Backend.register_backend(BACKEND, _group_of(device), devices=[NAME])
    return device


@contextmanager
def reading(device: Any, on_read: Callable[[str], None] | None = None) -> Iterator[dict[str, int]]:
    """Count what the host reads meanwhile, by operator; ``on_read`` is called where it does."""
    device.forget_counts()
    device.on_read(on_read)
    found: dict[str, int] = {}
    try:
        yield found
    finally:
        device.on_read(None)
        found.update(device.reads())


def _group_of(device: Any) -> Callable[..., Any]:
    def make(store: dist.Store, rank: int, size: int, timeout: Any) -> Any:
        return device.group(dist.ProcessGroupGloo(store, rank, size, timeout))

    return make


def _module(device: Any) -> types.ModuleType:
    module = types.ModuleType(f"torch.{NAME}")

    def index_of(which: Any) -> int:
        if which is None:
            return -1
        return which if isinstance(which, int) else torch.device(which).index or 0

    def manual_seed_all(seed: int) -> None:
        for each in range(device.device_count()):
            device.default_generator(each).manual_seed(seed)

    functions: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "init": lambda: None,
        "device_count": device.device_count,
        "current_device": device.current_device,
        "set_device": lambda which: device.set_device(index_of(which)),
        "synchronize": lambda which=None: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: device.default_generator(-1).manual_seed(seed),
        "manual_seed_all": manual_seed_all,
        "get_rng_state": lambda which=None: device.default_generator(index_of(which)).get_state(),
        "set_rng_state": lambda state, which=None: device.default_generator(index_of(which)).set_state(state),
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    for name, function in functions.items():
        setattr(module, name, function)
    module.default_generators = tuple(device.default_generator(each) for each in range(device.device_count()))
    return module
