"""A pipeline of diffusers and the requests that a user makes of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from zoo.transformers import Draw

REQUESTS = (0, 1)
_STEPS = "num_inference_steps"
_OUTPUT = "output_type"
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

Arguments = Callable[[Draw, int], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """``arguments`` draws those of request 0 or 1; the second asks for another size, or differs where it can.

    ``pair`` turns the arguments of one image into those of two, where no argument of the pipeline counts them. Steps,
    a generator and the number of images are added; everything else is left at its default. ``section`` names the only
    work that there is to split, where a pipeline has both.
    """

    name: str
    make: Callable[[], Any]
    arguments: Arguments
    steps: int = 2
    pair: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    section: str = ""

    def build(self, device: str = "cpu") -> Any:
        """The pipeline in fp32, the same on every rank, its progress bars off."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)

    def call(self, pipe: Any, request: int, images: int = 1, **more: Any) -> Any:
        """What the pipeline returns by default, or with ``more`` arguments.

        The global generator is seeded too: some draw from it regardless.
        """
        names = set(inspect.signature(type(pipe).__call__).parameters)
        given = moved(self.arguments(Draw(10 + request), request), pipe)
        if _STEPS in names:
            given = {_STEPS: self.steps, **given}
        if images > 1:
            given = self._several(given, names, images)
        if "generator" in names:
            seeds = [100 * request + at for at in range(images)]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            given["generator"] = generators if images > 1 else generators[0]
        torch.manual_seed(request)
        return pipe(**given, **more)

    @staticmethod
    def rounds(pipe: Any) -> bool:
        """Whether the pipeline can be asked for arrays in place of rounded pictures."""
        return _OUTPUT in inspect.signature(type(pipe).__call__).parameters

    def unrounded(self, pipe: Any, request: int, images: int = 1) -> Any:
        """What the pipeline returns when it is asked for arrays."""
        return self.call(pipe, request, images, **{_OUTPUT: "np"})

    def _several(self, given: dict[str, Any], names: set[str], images: int) -> dict[str, Any]:
        if self.pair is not None:
            return self.pair(given)
        name = next((name for name in _PER_PROMPT if name in names), None)
        if name is None:
            raise OneImage(f"no argument among {', '.join(_PER_PROMPT)}")
        return {**given, name: images}


def moved(arguments: Any, subject: Any) -> Any:
    """Arguments with their tensors where a pipeline or a module lies."""
    device = getattr(subject, "device", torch.device("cpu"))
    return pytree.tree_map_only(torch.Tensor, lambda each: each.to(device), arguments)


def repeated(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of two prompts: tensors and lists of one entry hold it twice."""
    return {name: _twice(value) for name, value in given.items()}


def _twice(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim and len(value) == 1:
        return torch.cat([value, value])
    return value * 2 if isinstance(value, list) and len(value) == 1 else value


class OneImage(Exception):
    """The pipeline makes one image a call."""
