"""Which device this rank computes on: decided here alone, and current before anything is loaded or connected."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xdit_compile.errors import UsageError

from .world import World

CPU = torch.device("cpu")
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
"""What says which devices of a host a process sees."""
ADVICE = (
    "call torch.accelerator.set_device_index(local_rank) before anything is loaded, as device = "
    "xdit_compile.local_device() does, then pipe.to(device) or pipe.enable_model_cpu_offload(device=device)"
)


def accelerator() -> torch.device | None:
    """The kind of accelerator that is here, without an index; None where there is none."""
    return torch.accelerator.current_accelerator(check_available=True)


def local_device(world: World | None = None) -> torch.device:
    """Make this rank's device the current one: to be called before anything is loaded or a process group is made.

    It is the accelerator of the rank's number on its host. Another than the first, which a program made current before,
    stays.

    Args:
        world: this process's place; as a rule what its launcher says.

    Returns:
        The device with its index, or the CPU where there is no accelerator.

    Raises:
        UsageError: the rank's host has fewer accelerators than ranks.
    """
    kind = accelerator()
    if kind is None:
        return CPU
    index = torch.accelerator.current_device_index() or local_index(world or here(), torch.accelerator.device_count())
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)


def here() -> World:
    """This process's place: by its launcher, or else by its process group."""
    world = World.from_environment()
    if world.launched or not (dist.is_available() and dist.is_initialized()):
        return world
    return World(dist.get_rank(), None, dist.get_world_size())


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and speaks; so is a process that no launcher started."""
    return here().rank == 0


def local_index(world: World, count: int, environment: Mapping[str, str] = os.environ) -> int:
    """Which of ``count`` visible accelerators is this rank's. A launcher such as srun may show every rank its own.

    Raises:
        UsageError: there are fewer than ranks on this host.
    """
    if count == 1 and any(environment.get(name) for name in VISIBLE):
        return 0
    if world.local_rank is None:
        return world.rank % count
    if world.local_rank >= count:
        raise UsageError(
            f"rank {world.rank} is number {world.local_rank} on its host, counted from 0, and sees {count} "
            f"accelerators; start at most {count} ranks a host, or compute on the CPU (--device cpu)"
        )
    return world.local_rank


def resolve(device: torch.device | str) -> torch.device:
    """A device with its index, made current if it is an accelerator: ``cuda`` is this rank's.

    Raises:
        UsageError: there is no such device.
    """
    requested, kind = torch.device(device), accelerator()
    if requested.type in ("cpu", "meta"):
        return requested
    if kind is None or requested.type != kind.type:
        raise UsageError(f"device {device}: there is no {requested.type} here; take {kind.type if kind else 'cpu'}")
    if requested.index is None:
        return local_device()
    if requested.index >= (count := torch.accelerator.device_count()):
        raise UsageError(f"device {device}: only {count} are visible, counted from 0; leave out the index")
    torch.accelerator.set_device_index(requested.index)
    return requested


def execution_device(module: nn.Module, otherwise: torch.device | str = CPU) -> torch.device:
    """Where a module computes: where hooks that offload it bring it, or else where its weights are.

    Args:
        otherwise: of a module whose weights are nowhere yet.
    """
    hooked = (device for child in module.modules() for device in _onto(child) if device is not None)
    weights = (each.device for each in module.parameters() if not each.is_meta)
    return _indexed(next(itertools.chain(hooked, weights), otherwise))


def _onto(module: nn.Module) -> Iterator[Any]:
    """The devices onto which hooks of accelerate and diffusers bring a module's own weights while it runs."""
    own = vars(module)
    yield from (getattr(hook, "execution_device", None) for hook in hooks_of(own.get("_hf_hook")))
    registered = getattr(own.get("_diffusers_hook"), "hooks", {})
    yield from (getattr(getattr(hook, "group", None), "onload_device", None) for hook in registered.values())


def hooks_of(hook: Any) -> Iterator[Any]:
    """A hook of accelerate, and those that it plays one after the other."""
    yield hook
    for each in getattr(hook, "hooks", ()):
        yield from hooks_of(each)


def _indexed(device: torch.device | str | int) -> torch.device:
    kind = accelerator()
    if isinstance(device, int):
        return torch.device(kind.type if kind else "cuda", device)
    device = torch.device(device)
    if device.index is None and kind is not None and device.type == kind.type:
        return torch.device(kind.type, torch.accelerator.current_device_index())
    return device


def settle(devices: Iterable[torch.device], world: World | None = None) -> tuple[torch.device, str]:
    """The device on which modules compute, made current where it can be this rank's.

    It can be if it is the current one already, or that of the rank's number on its host. Modules on the CPU count only
    where there are no others.

    Returns:
        The device, and in one line why it cannot be this rank's; nothing where it can.
    """
    accelerators = list(dict.fromkeys(device for device in devices if device.type not in ("cpu", "meta")))
    if not accelerators:
        return CPU, ""
    if len(accelerators) > 1:
        names = " and ".join(map(str, accelerators))
        return accelerators[0], f"what is to be split is on {names}, which have to be one device; {ADVICE}"
    device, kind = accelerators[0], accelerator()
    if kind is None or kind.type != device.type:
        return device, f"its weights are on {device}, which torch.accelerator does not know; move them to the CPU"
    index = torch.accelerator.current_device_index()
    if device.index not in (index, _own(world or here())):
        return device, f"its weights are on {device} but its current device is {kind.type}:{index}; {ADVICE}"
    torch.accelerator.set_device_index(device.index)
    return device, ""


def _own(world: World) -> int | None:
    """The index that is this rank's by its number; None where its host has none for it."""
    try:
        return local_index(world, torch.accelerator.device_count())
    except UsageError:
        return None


@contextmanager
def current(device: torch.device | None) -> Iterator[None]:
    """Have an accelerator be the current device meanwhile: which one is, every thread says for itself."""
    if device is None or device.type == "cpu":
        yield
        return
    before = torch.accelerator.current_device_index()
    torch.accelerator.set_device_index(device.index)
    try:
        yield
    finally:
        torch.accelerator.set_device_index(before)


def refuse_moved(name: str, module: nn.Module, device: torch.device) -> None:
    """See to it that a module computes where ranks met, or on the CPU. Of its parts only the first is looked at.

    Raises:
        UsageError: it computes on another device; says what to do.
    """
    hooked = (each for each in _onto(module) if each is not None)
    weights = (each.device for each in module.parameters() if not each.is_meta)
    now = _indexed(next(itertools.chain(hooked, weights), device))
    if now.type != "cpu" and now != device:
        raise UsageError(
            f"{name} computes on {now}, but ranks met to compute on {device}: call xdit_compile.restore, {ADVICE}, "
            "then parallelize"
        )


def finish() -> None:
    """Wait until the accelerator, where there is one, has done what it was told: before a time is taken."""
    kind = accelerator()
    if kind is not None and getattr(torch.get_device_module(kind.type), "is_initialized", lambda: True)():
        torch.accelerator.synchronize()


def backend_for(device: torch.device) -> str:
    """What a process group is made of whose ranks compute on a device; tensors on the CPU go through it, too."""
    if device.type == "cpu":
        return "gloo"
    own = dist.Backend.default_device_backend_map.get(device.type, "gloo")
    return f"cpu:gloo,{device.type}:{own}" if own != "gloo" and dist.is_backend_available(own) else "gloo"


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that numbers on a device come from where none is named."""
    kind = accelerator()
    if kind is None or device.type != kind.type:
        return torch.default_generator
    current = torch.accelerator.current_device_index()  # initialises the accelerator, which makes its generators
    own = _generators(kind)
    return own[current if device.index is None else device.index] if own else torch.default_generator


def default_generators() -> list[torch.Generator]:
    """The generators of all devices that numbers come from where none is named, as far as they exist yet."""
    kind = accelerator()
    return [torch.default_generator, *(() if kind is None else _generators(kind))]


def current_generators() -> dict[str, torch.Generator]:
    """By kind of device the generator that numbers come from where none is named, as far as it exists yet."""
    generators = {"cpu": torch.default_generator}
    if (kind := accelerator()) is not None and (own := _generators(kind)):
        generators[kind.type] = own[torch.accelerator.current_device_index()]
    return generators


def _generators(kind: torch.device) -> tuple[torch.Generator, ...]:
    """Those of an accelerator's devices; none before it is initialised."""
    return tuple(getattr(torch.get_device_module(kind.type), "default_generators", ()))
