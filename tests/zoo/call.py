"""Short ways to write down the keyword arguments of a denoiser call, for the tables of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from zoo.transformers import Case, Draw, Inputs, image_ids

TEXT, DIM, POOLED, HEADS = 13, 28, 22, 5
GRID = {"h": 7, "w": 11}
IMAGE = {"h": 14, "w": 22}
VIDEO = {"frames": 5, "h": 10, "w": 14}


def call(d: Draw, b: int, **kwargs: Any) -> Inputs:
    """Keyword arguments as a pipeline passes them: callables are drawn, the rest is passed on.

    ``return_dict`` is False unless given; None leaves it out, for a forward method without it.
    """
    given = {"return_dict": False, **kwargs}
    drawn = {name: value(d, b) if callable(value) else value for name, value in given.items()}
    return (), {name: value for name, value in drawn.items() if name != "return_dict" or value is not None}


def normal(*shape: int) -> Callable[[Draw, int], torch.Tensor]:
    return lambda d, b: d.normal(b, *shape)


def time(value: float) -> Callable[[Draw, int], torch.Tensor]:
    return lambda d, b: d.full(b, value)


def step(value: int = 701) -> Callable[[Draw, int], torch.Tensor]:
    return lambda d, b: d.steps(b, value)


def mask(*lengths: int, total: int = TEXT, dtype: torch.dtype = torch.int64) -> Callable[[Draw, int], torch.Tensor]:
    return lambda d, b: d.mask([lengths[i % len(lengths)] for i in range(b)], total, dtype)


def rows(*values: float) -> Callable[[Draw, int], torch.Tensor]:
    """The same row of numbers for every sample."""
    return lambda d, b: d.put(torch.tensor([values] * b))


def fixed(make: Callable[[], Any]) -> Callable[[Draw, int], Any]:
    """Tensors that do not depend on the batch, such as rotary tables."""

    def draw(d: Draw, b: int) -> Any:
        made = make()
        return d.put(*made) if isinstance(made, (tuple, list)) else d.put(made)

    return draw


def case(
    name: str,
    make: Callable[[], nn.Module],
    batch: int = 2,
    idle: Sequence[tuple[str, str]] = (),
    reach: float = 0.9,
    lengths: Sequence[tuple[str, tuple[int, ...]]] = (),
    **kwargs: Any,
) -> Case:
    return Case(name, make, partial(call, **kwargs), batch, tuple(idle), reach, tuple(lengths))


LATENT = normal(6, 14, 22)
CLIP = normal(6, 5, 10, 14)
PROMPT = normal(TEXT, DIM)
PACKED: dict[str, Any] = {
    "hidden_states": normal(77, 12),
    "encoder_hidden_states": PROMPT,
    "timestep": time(0.7),
    "txt_ids": fixed(lambda: torch.zeros(TEXT, 3)),
    "img_ids": fixed(lambda: image_ids(7, 11)),
}
SIZES: dict[str, Any] = {"original_size": rows(112, 176), "target_size": rows(112, 176), "crop_coords": rows(0, 0)}
