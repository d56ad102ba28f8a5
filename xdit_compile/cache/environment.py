"""What a compiled program depends on besides the module and its call: versions, the machine, and what is set."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch

from xdit_compile.ir.precision import said
from xdit_compile.plan.packages import version_of

from .portable import describe_value

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "numpy")
KERNELS = ("flash-attn", "flash-attn-3", "flash-attn-4", "sageattention", "yunchang")
"""Packages that compute attention where they are there: what was compared with one version was not with another."""
COMPILERS = ("torch", "triton")
"""Those of them that bring programs along, by the names of their folders."""
CONFIGS = ("torch._inductor.config", "torch._functorch.config", "torch._dynamo.config")
"""Modules of settings; one that was not imported yet cannot have been changed, and importing it takes a second."""
UNIMPORTANT = (
    "trace", "worker_start_method", "compile_threads", "cudagraph_policy", "fx_graph_cache", "fx_graph_remote_cache",
    "autotune_local_cache", "autotune_remote_cache", "bundled_autotune_remote_cache", "verbose_progress", "debug",
)  # fmt: skip
"""Settings of inductor that change no code, by how they begin."""
PREFIXES = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_", "TRITON_", "DIFFUSERS_ATTN_")
"""How environment variables begin that count. Ours do not: what they say stands in the plan, or changes no code."""
VARIABLES = ("ATEN_CPU_CAPABILITY", "CXX", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
LIBDEVICE = "TRITON_LIBDEVICE_PATH"
OF_HOST = ("ATEN_CPU_CAPABILITY", "CXX", "TORCH_CUDA_ARCH_LIST")
"""Environment variables that decide on code for the processor alone, and on extensions."""
APART = re.compile(
    r"(^|_)(DIR|HOME|FOLDER|LOG|LOGS|LOGGING|DUMP|TRACE|DEBUG|PROFILE|PROGRESS|REDIS)(_|$)"
    r"|(^|_)(NCCL|GLOO|DIST|DISTRIBUTED|STACKTRACES)(_|$)"
    r"|_CACHE$|_CACHE_MANAGER$|_COMPILE_THREADS$|_WORKER_START$|_WORKER_LOGPATH$|_WARM_POOL$"
)
"""Environment variables that name folders, write down what happens, or say how it is done, and so change no code."""
OF_CARDS = ("precisions", "float16 sums", "bfloat16 sums", "deterministic", "cudnn", "default dtype")
"""What of the settings of numerics counts for code that a card runs, in which attention is one operator."""
ATTENTIONS = ("flash", "mem_efficient", "math", "cudnn")
SIZES = ("l1d_cache_size", "l2_cache_size", "num_logical_cores", "num_physical_cores", "num_sockets")
"""What is said of a processor besides what it can do."""


def environment(device: torch.device, variables: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Describe what a compiled program depends on besides the module and its call, in plain data.

    Args:
        device: where it computes. Of an accelerator its name and abilities count; of the processor, on which parts of
            any program may run, what it can do and the compiler.
        variables: environment variables.

    Raises:
        Unportable: a setting of PyTorch's compiler that another process would not find again, as a lambda.
    """
    return {
        "versions": _versions(),
        "device": _accelerator(device) if device.type != "cpu" else {"kind": "cpu", "threads": torch.get_num_threads()},
        "processor": _processor(),
        "compiler": _compiler(variables),
        "numerics": _numerics(),
        "settings": {name: _changed(name) for name in CONFIGS},
        "variables": dict(sorted(_counted(variables))),
    }


def environment_of_target(target: str, variables: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Describe what a compiled program for a card depends on, wherever it is made, in plain data.

    It is the same on a machine without a card and on one that has it, with torch built for the CPU and for CUDA, if the
    release of torch is: neither the build nor processor, C++ compiler and name of the card are in it, nor what is
    decided when attention runs.

    Args:
        target: the architecture, such as ``sm_90``.
        variables: environment variables.

    Raises:
        Unportable: as `environment`.
    """
    versions = {name: _version(name) for name in PACKAGES}
    versions["torch"] = str(versions["torch"]).partition("+")[0]
    counted = {name: value for name, value in _counted(variables) if name not in OF_HOST}
    return {
        "versions": {**versions, "python": list(sys.version_info[:2])},
        "device": {"kind": "cuda", "target": target},
        "numerics": {name: value for name, value in _numerics().items() if name in OF_CARDS},
        "settings": {name: _changed(name) for name in CONFIGS},
        "variables": dict(sorted(counted.items())),
    }


def target_of(device: torch.device) -> str | None:
    """The architecture of a card of NVIDIA's; None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"sm_{properties.major}{properties.minor}"


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {name: _version(name) for name in (*PACKAGES, *KERNELS)}
    return {**versions, "python": list(sys.version_info[:2]), "torch git": torch.version.git_version}


def _version(name: str) -> str | None:
    """The version that a package says it has; None where it is not there. Of torch that which is loaded."""
    return str(torch.__version__) if name == "torch" else version_of(name)


def _accelerator(device: torch.device) -> dict[str, Any]:
    described: dict[str, Any] = {"kind": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {"name": properties.name, "capability": [properties.major, properties.minor]}
        described |= {"runtime": torch.version.cuda or torch.version.hip}
    elif (module := getattr(torch, device.type, None)) is not None and hasattr(module, "get_device_name"):
        described["name"] = str(module.get_device_name(device))
    return described


def _processor() -> dict[str, Any]:
    """What the processor can do. Inductor picks its vectors by this and the compiler, for which it runs the latter."""
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    abilities = {name: can[name] for name in sorted(can) if name not in SIZES}
    return {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "abilities": [f"{name}={value}" for name, value in abilities.items()],
    }


def _compiler(variables: Mapping[str, str]) -> list[Any]:
    """The C++ compiler, without running it: where it really lies, its size and when it was written."""
    name = variables.get("CXX", "g++")
    command = shutil.which(name, path=variables.get("PATH"))
    if command is None:
        return [name]
    path = os.path.realpath(command)
    state = os.stat(path)
    return [name, path, state.st_size, int(state.st_mtime)]


def _numerics() -> dict[str, Any]:
    """What is set on how numbers are computed."""
    attention = [name for name in ATTENTIONS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    order: list[int] = getattr(torch._C, "_get_sdp_priority_order", list)()
    return {
        "precisions": said(),
        "float16 sums": str(torch._C._get_cublas_allow_fp16_reduced_precision_reduction()),
        "bfloat16 sums": str(torch._C._get_cublas_allow_bf16_reduced_precision_reduction()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": [torch.backends.cudnn.enabled, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark],
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "default dtype": str(torch.get_default_dtype()),
        "attention": attention,
        "attention order": [int(each) for each in order],
    }


def _changed(name: str) -> dict[str, Any]:
    """What a program has set in a module of settings, apart from environment variables."""
    entries = getattr(sys.modules.get(name), "_config", {})
    unset = _unset()
    changed = {}
    for key, entry in sorted(entries.items()):
        override = entry.user_override
        override = override.get() if isinstance(override, ContextVar) else override
        otherwise = entry.default if entry.env_value_default is unset else entry.env_value_default
        if override is not unset and override != otherwise and not key.startswith(UNIMPORTANT):
            changed[key] = describe_value(override, f"{name}.{key}")
    return changed


def _unset() -> Any:
    """What settings hold that nobody set."""
    from torch.utils import _config_module

    return _config_module._UNSET_SENTINEL


def _counted(variables: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Those that a user may have set.

    The first compilation of a process sets some for the next, as where the ptxas lies that came with a package: its
    version says as much, and which call of a process is the first must not matter.
    """
    inside = tuple(f"{folder}{os.sep}" for name in COMPILERS for folder in _folders(name))
    for name, value in variables.items():
        if name in VARIABLES or (name.startswith(PREFIXES) and not APART.search(name)):
            if not value.startswith(inside) and not (name == LIBDEVICE and value == _libdevice_of_toolkit()):
                yield name, value


def _libdevice_of_toolkit() -> str | None:
    """The file of CUDA's toolkit, which PyTorch sets for Triton where it emulates roundings, as all graphs here ask."""
    from torch.utils.cpp_extension import CUDA_HOME

    return None if CUDA_HOME is None else os.path.join(CUDA_HOME, "nvvm", "libdevice", "libdevice.10.bc")


def _folders(package: str) -> list[str]:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec is not None else []
