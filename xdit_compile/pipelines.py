"""What a diffusers pipeline holds that can be split, and what must happen around its outer call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .agreement import Agreement
from .errors import UsageError

DENOISERS = ("transformer", "unet", "controlnet", "prior", "decoder", "dit")
"""Component names that diffusers gives to denoisers; a pipeline with several numbers them (``transformer_2``)."""


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
        (name, module)
        for name, module in components.items()
        if isinstance(module, nn.Module) and name.rstrip("_0123456789") in DENOISERS
    ]
    if not found:
        raise UsageError(f"this pipeline has no denoiser among {', '.join(components)}; parallelize the module itself")
    yield from found


class _Synchronised:
    """Mixed into a pipeline's class: its outer call draws the same random numbers on every rank.

    Python looks ``__call__`` up on the class, so an instance alone cannot change it; name and ``isinstance`` stay.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        share_random_state(vars(self)[AGREEMENT])
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


AGREEMENT = "_xdit_compile_agreement"


def synchronise_call(pipe: Any, agreement: Agreement) -> None:
    """Let every outer call start from rank 0's random state: some draw from it even when they are given a generator."""
    cls = type(pipe)
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    object.__setattr__(pipe, AGREEMENT, agreement)
    pipe.__class__ = type(cls.__name__, (_Synchronised, cls), body)


def restore_call(pipe: Any) -> None:
    """Give a pipeline its own class back."""
    if isinstance(pipe, _Synchronised):
        vars(pipe).pop(AGREEMENT)
        pipe.__class__ = type(pipe).__mro__[2]


def share_random_state(agreement: Agreement) -> None:
    """Set the default generators of all ranks to rank 0's state."""
    devices = [torch.default_generator]
    if torch.cuda.is_available():
        devices.append(torch.cuda.default_generators[torch.cuda.current_device()])
    for generator in devices:
        state = agreement.share(generator.get_state().numpy().tobytes())
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
