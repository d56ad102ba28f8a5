"""What a diffusers pipeline holds that can be split, and what must happen around its outer call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from xdit_compile.capture.state.in_place import held, own_class, put_back, put_in_place
from xdit_compile.errors import UsageError, WrongTypeError
from xdit_compile.ir.results import replaced
from xdit_compile.runtime.tensors.deferred_tensor import values_of
from xdit_compile.runtime.tensors.patched_tensor import whole_of

from .session import Session

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
        a_class = isinstance(target, type)
        what = f"the class {target.__name__}" if a_class else f"{target!r:.80} of type {type(target).__name__}"
        raise WrongTypeError(
            f"{what} is neither a diffusers pipeline nor a module; "
            "load one first, as pipe = DiffusionPipeline.from_pretrained(path) does"
        )
    named_denoisers = [
        (name, uncompiled(module))
        for name, module in components.items()
        if isinstance(module, nn.Module) and is_denoiser(name)
    ]
    if not named_denoisers:
        raise UsageError(f"this pipeline has no denoiser among {', '.join(components)}; parallelize the module itself")
    yield from named_denoisers


def autoencoders(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every autoencoder of a pipeline; a bare module that encodes and decodes is its own."""
    if isinstance(target, nn.Module):
        named_modules = [("module", target)]
    else:
        components = getattr(target, "components", None) or {}
        coders = ((name, module) for name, module in components.items() if name.rstrip("_0123456789") in AUTOENCODERS)
        named_modules = [(name, uncompiled(module)) for name, module in coders]
    yield from ((name, module) for name, module in named_modules if _codes(module))


def uncompiled(module: Any) -> Any:
    """The module that ``torch.compile`` was given; what it made of it calls that one."""
    return getattr(module, "_orig_mod", module)


def _codes(module: Any) -> bool:
    return isinstance(module, nn.Module) and all(callable(getattr(module, method, None)) for method in CODING)


def is_denoiser(component: str) -> bool:
    """Whether diffusers gives a component of this name to a denoiser."""
    return component.rstrip("_0123456789") in DENOISERS


STEPS = "num_inference_steps"
"""The argument by which diffusers' pipelines are told how many steps to make."""


def wrap_call(pipe: Any, session: Session) -> None:
    """Make a pipeline's outer call this rank's part of a request of all ranks; `restore_call` undoes it.

    What it returns is made whole, as it may be read on one rank alone.
    """
    original_call = functools.partial(own_class(pipe).__call__, pipe)

    def call(*args: Any, **kwargs: Any) -> Any:
        if session.closed:
            return original_call(*args, **kwargs)
        try:
            bound = inspect.signature(original_call).bind(*args, **kwargs)
        except TypeError:
            with session.entered():
                raise
        with session.request(bound.arguments, bound.arguments.get(STEPS)) as agreed:
            bound.arguments.update(agreed)
            return session.made(replaced(original_call(*bound.args, **bound.kwargs), torch.Tensor, there))

    put_in_place(pipe, {"__call__": call})


def there(tensor: torch.Tensor) -> torch.Tensor:
    """All values of a tensor that a pipeline returns, which may then be read on one rank alone; within its request."""
    return values_of(whole_of(tensor))


def restore_call(pipe: Any) -> None:
    """Give a pipeline its own class back."""
    if held(pipe):
        put_back(pipe)


def session_of(target: Any) -> Session | None:
    """The session of a module that is parallelized."""
    return next((each.session for each in held(target).values() if hasattr(each, "session")), None)


def follow_modules(base: type) -> None:
    """Have pipelines that are made of parallelized modules make requests as well.

    diffusers makes one pipeline of another's modules (``from_pipe``, ``Other(**pipe.components)``) and tells nobody but
    ``register_modules`` of the new one, so that is where it must be noticed: before the first call, in which ranks
    would already draw different latents.

    Args:
        base: the class that all pipelines derive from.
    """
    own = base.register_modules  # type: ignore[attr-defined]
    if hasattr(own, FOLLOWING):
        return

    @functools.wraps(own)
    def register_modules(self: Any, **modules: Any) -> None:
        own(self, **modules)
        session = next((found for module in modules.values() if (found := session_of(module)) is not None), None)
        if session is not None and not held(self):
            wrap_call(self, session)

    setattr(register_modules, FOLLOWING, True)
    base.register_modules = register_modules  # type: ignore[attr-defined]


FOLLOWING = "_xdit_compile_following"
