"""A denoiser or an autoencoder that no pipeline's case reaches, called by itself as its pipeline would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from conformance.case import OneImage, moved
from torch import nn
from zoo.transformers import Case as Model
from zoo.transformers import Draw

Change = dict[int, int] | Any
"""Of an argument: lengths by dimension that it is cut to, or another value."""


@dataclass(frozen=True)
class Alone:
    """``feed`` draws positional and keyword arguments for a batch; ``second`` makes those of request 1 from them.

    ``batch`` is that of one image: 2 where guidance doubles it. With ``tuples`` the class is asked for a tuple, as some
    lose their result in an output object.
    """

    name: str
    make: Callable[[], nn.Module]
    feed: Callable[[Draw, int], tuple[tuple[Any, ...], dict[str, Any]]]
    second: dict[str | int, Change]
    batch: int = 1
    tuples: bool = False
    steps: int = 2
    section: str = "denoising"

    def build(self, device: str = "cpu") -> nn.Module:
        """The module in fp32, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval().requires_grad_(False).to(device)

    def call(self, module: nn.Module, request: int, images: int = 1, **more: Any) -> Any:
        """What the module returns for ``images`` times its batch."""
        args, kwargs = moved(self.feed(Draw(10 + request), self.batch * images), module)
        kwargs = {name: value for name, value in kwargs.items() if self.tuples or name != "return_dict"}
        if request:
            args, kwargs = changed(args, kwargs, self.second)
        torch.manual_seed(request)
        with torch.no_grad():
            return module(*args, **kwargs, **more)

    @staticmethod
    def rounds(module: nn.Module) -> bool:
        """Nothing is rounded."""
        return False


@dataclass(frozen=True)
class Coder:
    """An autoencoder and, for each request, the shapes of what it encodes and of what it decodes.

    ``encode`` and ``decode`` are called with these alone; the second is empty where a class cannot.
    """

    name: str
    make: Callable[[], nn.Module]
    pictures: tuple[tuple[int, ...], ...]
    latents: tuple[tuple[int, ...], ...]
    decoding: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    section: str = "coding"

    def build(self, device: str = "cpu") -> nn.Module:
        """The module in fp32, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().eval().requires_grad_(False).to(device)

    def call(self, module: Any, request: int, images: int = 1, **more: Any) -> dict[str, Any]:
        """What both methods return, distributions as the numbers that make them."""
        if images > 1:
            raise OneImage("an autoencoder alone")
        draw, made = Draw(10 + request), {}
        torch.manual_seed(request)
        with torch.no_grad():
            if self.pictures:
                made["encoded"] = opened(module.encode(moved(draw.normal(*self.pictures[request]), module)))
            if self.latents:
                latent, options = moved((draw.normal(*self.latents[request]), self.decoding), module)
                made["decoded"] = opened(module.decode(latent, **options))
        return made

    @staticmethod
    def rounds(module: nn.Module) -> bool:
        """Nothing is rounded."""
        return False


def opened(result: Any) -> Any:
    """What an autoencoder returned, a distribution as its parameters."""
    found = getattr(result, "latent_dist", result)
    return getattr(found, "parameters", found) if not isinstance(found, torch.Tensor) else found


def changed(args: tuple[Any, ...], kwargs: dict[str, Any], changes: dict[str | int, Change]) -> tuple[Any, Any]:
    """Arguments with some of them, by name or place, cut or replaced."""
    named: dict[str | int, Any] = {**dict(enumerate(args)), **kwargs}
    for key, change in changes.items():
        named[key] = _cut(named[key], change) if isinstance(change, dict) else change
    return tuple(named[at] for at in range(len(args))), {key: named[key] for key in kwargs}


def _cut(value: Any, lengths: dict[int, int]) -> Any:
    """The first ``lengths`` of a tensor, or of each in a list of them."""
    if isinstance(value, list | tuple):
        return type(value)(_cut(each, lengths) for each in value)
    for dim, length in lengths.items():
        value = value.narrow(dim, 0, length)
    return value.contiguous()


def of_zoo(name: str, model: Model, second: dict[str | int, Change]) -> Alone:
    """A case of a model of the zoo."""
    return Alone(name, model.build, model.feed, second, model.batch)
