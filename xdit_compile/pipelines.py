"""What a diffusers pipeline holds that can be split, and what must happen around its outer call."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .agreement import Agreement
from .deferred import values_of
from .errors import UsageError
from .generations import Generation
from .guidance import Branches
from .patched import whole_of
from .replicas import Replicas
from .results import replaced

DENOISERS = ("transformer", "unet", "controlnet", "prior", "decoder", "dit")
"""Component names that diffusers gives to denoisers; a pipeline with several numbers them (``transformer_2``)."""

AUTOENCODERS = ("vae", "movq", "vqvae", "vqgan", "image_vae", "video_vae")
"""Component names that diffusers gives to autoencoders of pictures and videos."""
CODING = ("decode", "encode")
"""The methods by which a pipeline calls an autoencoder."""


def denoisers(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every denoiser of a pipeline; a bare module is its own.

    Raises:
        UsageError: for anything that has none.
    """
    if isinstance(target, nn.Module):
        yield "module", target
        return
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise UsageError(f"a {type(target).__name__} is neither a diffusers pipeline nor a module")
    found = [
        (name, module) for name, module in components.items() if isinstance(module, nn.Module) and is_denoiser(name)
    ]
    if not found:
        raise UsageError(f"this pipeline has no denoiser among {', '.join(components)}; parallelize the module itself")
    yield from found


def autoencoders(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every autoencoder of a pipeline; a bare module that encodes and decodes is its own."""
    if isinstance(target, nn.Module):
        found = [("module", target)]
    else:
        components = getattr(target, "components", None) or {}
        found = [(name, module) for name, module in components.items() if name.rstrip("_0123456789") in AUTOENCODERS]
    yield from ((name, module) for name, module in found if _codes(module))


def _codes(module: Any) -> bool:
    return isinstance(module, nn.Module) and all(callable(getattr(module, method, None)) for method in CODING)


def is_denoiser(component: str) -> bool:
    """Whether diffusers gives a component of this name to a denoiser."""
    return component.rstrip("_0123456789") in DENOISERS


@dataclasses.dataclass(frozen=True)
class Outer:
    """What happens around the outer call of a pipeline."""

    agreement: Agreement
    branches: Branches
    generation: Generation
    replicas: Replicas


STEPS = "num_inference_steps"
"""The argument by which diffusers' pipelines are told how many steps to make."""


class _Parallel:
    """Marks the class that `wrap_call` gives a pipeline."""


OUTER = "_xdit_compile_outer"


def wrap_call(pipe: Any, outer: Outer) -> None:
    """Make a pipeline's outer call this rank's part of a call of all ranks.

    The ranks that make the same images start from the same random state, since some pipelines draw from the default
    generators even when they are given one; images are shared out over replicas. Python looks ``__call__`` up on the
    class, so an instance alone cannot change it: the pipeline gets a class derived from its own, of the same name.
    """
    cls = type(pipe)
    own = cls.__call__

    @functools.wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = outer.replicas.arguments(functools.partial(own, self), args, kwargs)
        steps = inspect.signature(own).bind(self, *args, **kwargs).arguments.get(STEPS)
        with outer.generation.running(steps):
            share_random_state(outer.agreement)
            outer.branches.begin()
            result = replaced(own(self, *args, **kwargs), torch.Tensor, _there)
        return outer.replicas.joined(result)

    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "__call__": call}
    object.__setattr__(pipe, OUTER, outer)
    pipe.__class__ = type(cls.__name__, (_Parallel, cls), body)


def _there(tensor: torch.Tensor) -> torch.Tensor:
    """All values of a tensor: what a pipeline returns may be read on one rank alone."""
    return values_of(whole_of(tensor))


def restore_call(pipe: Any) -> None:
    """Give a pipeline its own class back."""
    if isinstance(pipe, _Parallel):
        vars(pipe).pop(OUTER)
        pipe.__class__ = type(pipe).__mro__[2]


def share_random_state(agreement: Agreement) -> None:
    """Set the default generators of all ranks to the state of the first."""
    devices = [torch.default_generator]
    if torch.cuda.is_available():
        devices.append(torch.cuda.default_generators[torch.cuda.current_device()])
    for generator in devices:
        state = agreement.share(generator.get_state().numpy().tobytes())
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
