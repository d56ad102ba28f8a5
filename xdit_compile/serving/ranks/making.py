"""One request on one rank: a pipeline of its own, which shares the models, and what comes of its call."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from xdit_compile.cli.options.request import PipelineRequest, Request
from xdit_compile.cli.running.output import pixels_of
from xdit_compile.cli.running.pipeline_call import call_arguments, call_pipeline
from xdit_compile.errors import XditCompileError
from xdit_compile.runtime.diffusers_pipeline import STEPS
from xdit_compile.runtime.session import Session
from xdit_compile.serving.queue.messages import Work

log = logging.getLogger(__name__)
_MODES = {"mask_image": "L"}


class Making:
    """What a rank knows of a request while it is made.

    Args:
        pipe: the parallelized pipeline, whose models are shared and which itself stays as it is.
        work: what is asked for.
        defaults: what counts where that says nothing.
        whole: the session in which all of the call is one request, where calls of several may not alternate.
        shows: whether this rank shows what there is so far.

    Attributes:
        step, steps: of the scheduler; ``steps`` None where that is not known.
        preview: the latest one that was not fetched: bytes and shape.
    """

    def __init__(self, pipe: Any, work: Work, defaults: PipelineRequest, whole: Session | None, shows: bool):
        self.work, self.step = work, 0
        self._request = _request(work, defaults)
        self.steps = self._request.num_inference_steps
        self.preview: tuple[bytes, tuple[int, ...]] | None = None
        self._whole, self._shows = whole, shows
        self._previews: Previews | None = None
        self._pipe = _own_pipeline(pipe)
        _count_steps(self._pipe, self._stepped)

    def run(self) -> np.ndarray:
        """Pixels as uint8, ``[N, H, W, C]`` or ``[N, F, H, W, C]``.

        Raises:
            XditCompileError: the pipeline does not take what is asked for, or makes nothing that can be shown.
        """
        work, request = self.work, self._request
        pictures = {name: _picture(data, _MODES.get(name, "RGB")) for name, data in work.pictures.items()}
        others = {**pictures, "strength": work.strength, **work.arguments}
        arguments, _ = call_arguments(self._pipe, request, **others)
        self._pipe.set_progress_bar_config(disable=True)
        around = (
            contextlib.nullcontext() if self._whole is None else self._whole.request(arguments, arguments.get(STEPS))
        )
        if work.preview_every and "latents" in inspect.signature(type(self._pipe).__call__).parameters:
            self._previews = Previews(self._pipe, arguments, request.seeds)
        with around:
            made, _ = call_pipeline(self._pipe, arguments, request.seeds)
        return pixels_of(made).bytes()

    def _stepped(self, made: Any) -> None:
        self.step += 1
        scheduler = self._pipe.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if self.steps is None and timesteps is not None:
            self.steps = max(1, len(timesteps) // max(1, getattr(scheduler, "order", 1)))
        every = self.work.preview_every
        if every and self.step % every == 0 and self.step != self.steps and self._previews is not None:
            self._previews.latents = _sample(made)
            self._show()

    def _show(self) -> None:
        """Decode what there is, as the pipeline itself would after its last step, if it can do that."""
        previews = self._previews
        if previews is None or previews.latents is None:
            return
        try:
            pixels = previews.pixels()
        except XditCompileError:
            raise
        except Exception:  # noqa: BLE001 - a pipeline that does not begin from latents, or not without steps
            log.info("this pipeline cannot show what there is after some of its steps")
            self._previews = None
            return
        if self._shows:
            self.preview = (pixels.tobytes(), pixels.shape)


class Previews:
    """What a pipeline makes of latents in no steps at all.

    Args:
        pipe: whose call takes ``latents``.
        arguments: of its call.
        seeds: as `call_pipeline` takes them.

    Attributes:
        latents: what is shown, as the scheduler returned it.
    """

    def __init__(self, pipe: Any, arguments: dict[str, Any], seeds: int | list[int]):
        self.latents: torch.Tensor | None = None
        self._pipe, self._arguments, self._seeds = copy.copy(pipe), arguments, seeds
        self._pipe.scheduler = _without_steps(pipe.scheduler)

    def pixels(self) -> np.ndarray:
        """Pixels as uint8, ``[N, H, W, C]`` or ``[N, F, H, W, C]``."""
        made, _ = call_pipeline(self._pipe, {**self._arguments, "latents": self.latents}, self._seeds)
        return pixels_of(made).bytes()


def _without_steps(scheduler: Any) -> Any:
    """A scheduler of the same kind that makes none, and takes latents as they are."""
    kind = type(scheduler)

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, *args, **kwargs)
        self.timesteps = self.timesteps[:0]

    functools.update_wrapper(set_timesteps, kind.set_timesteps)
    none: Any = type(kind.__name__, (kind,), {"set_timesteps": set_timesteps, "init_noise_sigma": 1.0})
    return none.from_config(scheduler.config)


def _sample(made: Any) -> torch.Tensor | None:
    """The latents in what a scheduler's step returned."""
    sample = made[0] if isinstance(made, tuple) else getattr(made, "prev_sample", None)
    return sample if isinstance(sample, torch.Tensor) else None


def _request(work: Work, defaults: PipelineRequest) -> Request:
    """What a command would ask for."""
    names = (
        "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length",
        "use_resolution_binning",
    )  # fmt: skip
    asked = {name: getattr(work, name, None) for name in names}
    fields = {name: getattr(defaults, name) if value is None else value for name, value in asked.items()}
    count = work.num_images if work.num_images > 1 else None
    return Request(
        prompt=(work.prompt,), seed=work.seed, num_images_per_prompt=count, num_frames=work.num_frames, **fields
    )


def _own_pipeline(pipe: Any) -> Any:
    """A shallow copy with a scheduler of its own, which keeps the state of one loop."""
    copied = copy.copy(pipe)
    for name, component in pipe.components.items():
        if hasattr(component, "set_timesteps"):
            setattr(copied, name, copy.deepcopy(component))
    return copied


def _count_steps(pipe: Any, stepped: Callable[[Any], None]) -> None:
    """Have a function called whenever the pipeline's scheduler made a step."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "step"):
        return
    step = scheduler.step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        stepped(result)
        return result

    scheduler.step = counted


def _picture(data: bytes, mode: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert(mode)
