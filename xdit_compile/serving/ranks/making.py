"""One request on one rank: a pipeline of its own, which shares the models, and what comes of its call."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

from xdit_compile.cli.options.request import PipelineRequest, Request
from xdit_compile.cli.running.output import pixels_of
from xdit_compile.cli.running.pipeline_call import call_arguments, call_pipeline
from xdit_compile.distributed.agreement import Agreement
from xdit_compile.errors import AgreementError, UsageError, XditCompileError
from xdit_compile.runtime.diffusers_pipeline import STEPS
from xdit_compile.runtime.session import Session
from xdit_compile.serving.queue.messages import Work

from .latents import INSTEAD, NAME, Decoder, Form, Forms, form_of, key_of, own_pipeline, read, tensor_of, written

log = logging.getLogger(__name__)
_MODES = {"mask_image": "L"}
C = TypeVar("C")


class Making:
    """What a rank knows of a request while it is made.

    Args:
        pipe: the parallelized pipeline, whose models are shared and which itself stays as it is.
        work: what is asked for.
        defaults: what counts where that says nothing.
        whole: the session in which all of the call is one request, where calls of several may not alternate.
        shows: whether this rank shows what there is so far, and what was made.
        forms: what is known of latents; added to.
        agreement: the talk among the ranks; None where this is the only one.

    Attributes:
        step, steps: of the scheduler; ``steps`` None where that is not known.
        preview: the latest one that was not fetched: bytes and shape.
    """

    def __init__(
        self, pipe: Any, work: Work, defaults: PipelineRequest, whole: Session | None, shows: bool, forms: Forms,
        agreement: Agreement | None,
    ):  # fmt: skip
        self.work, self.step = work, 0
        self._request = _request(work, defaults)
        self.steps = self._request.num_inference_steps if work.latents is None else None
        self.preview: tuple[bytes, tuple[int, ...]] | None = None
        self._whole, self._shows, self._forms, self._agreement = whole, shows, forms, agreement
        self._decoder: Decoder | None = None
        self._pipe = own_pipeline(pipe)
        _count_steps(self._pipe, self._stepped)

    def run(self) -> np.ndarray | bytes:
        """Pixels as uint8, ``[N, H, W, C]`` or ``[N, F, H, W, C]``; or latents as a file, where these are asked for.

        Raises:
            XditCompileError: the pipeline does not take what is asked for, or makes nothing that can be shown.
        """
        work, seeds = self.work, self._request.seeds
        pictures = {name: _picture(data, _MODES.get(name, "RGB")) for name, data in work.pictures.items()}
        others = {**pictures, "strength": work.strength, **work.arguments}
        arguments, _ = call_arguments(self._pipe, self._request, **others)
        self._pipe.set_progress_bar_config(disable=True)
        sizes = {name: picture.size for name, picture in pictures.items()}
        if work.latents is not None:
            form = self._form(arguments, sizes)
            latents = read(work.latents, form).to(getattr(self._pipe, "_execution_device", "cpu"))
            return Decoder(self._pipe, arguments, seeds).pixels(latents)
        if work.preview_every and NAME in inspect.signature(type(self._pipe).__call__).parameters:
            self._decoder = Decoder(self._pipe, arguments, seeds)
        if not work.makes_latents:
            return self._called(arguments, pixels_of).bytes()
        form = self._form(arguments, sizes)
        latents = self._called({**arguments, "output_type": "latent"}, tensor_of)
        if (tuple(latents.shape), latents.dtype) != (form.shape, form.dtype):
            raise XditCompileError(f"this pipeline ends with other latents than it begins with; {INSTEAD}")
        return written(latents)

    def _called(self, arguments: dict[str, Any], content: Callable[[Any], C]) -> C:
        """What is in the pipeline's result, which other ranks may hold parts of until the request is over."""
        whole, steps = self._whole, arguments.get(STEPS)
        with contextlib.nullcontext() if whole is None else whole.request(arguments, steps):
            return content(call_pipeline(self._pipe, arguments, self._request.seeds)[0])

    def _form(self, arguments: dict[str, Any], sizes: dict[str, tuple[int, int]]) -> Form:
        """The form of this request's latents, tried where that is not known.

        Raises:
            UsageError: they cannot be decoded exactly.
        """
        key = key_of(self.work, sizes)
        verdict = self._forms.get(key)
        if verdict is None:
            verdict = self._tried(arguments)
            self._forms.put(key, verdict)
        if isinstance(verdict, str):
            raise UsageError(verdict)
        return verdict

    def _tried(self, arguments: dict[str, Any]) -> Form | str:
        """What a trial shows, on all ranks alike, wherever it failed."""
        failure: Exception | None = None
        verdict: Form | str = f"another rank cannot decode these latents; {INSTEAD}"
        try:
            mine = form_of(self._pipe, arguments, self._request.seeds)
        except AgreementError:
            raise
        except Exception as error:  # noqa: BLE001 - raised below, once the others know
            failure = error
        if self._any("a trial of latents", failure is not None):
            raise failure or XditCompileError("another rank failed in a trial of latents")
        refused = isinstance(mine, str)
        return mine if self._any("what a trial of latents showed", refused) == refused else verdict

    def _any(self, stage: str, mine: bool) -> bool:
        return mine if self._agreement is None else self._agreement.any(stage, mine)

    def _stepped(self, made: Any) -> None:
        self.step += 1
        scheduler = self._pipe.scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        if self.steps is None and timesteps is not None:
            self.steps = max(1, len(timesteps) // max(1, getattr(scheduler, "order", 1)))
        every = self.work.preview_every
        if every and self.step % every == 0 and self.step != self.steps and (latents := _sample(made)) is not None:
            self._show(latents)

    def _show(self, latents: torch.Tensor) -> None:
        """Decode what there is, as the pipeline itself would after its last step, if it can do that."""
        if self._decoder is None:
            return
        try:
            pixels = self._decoder.pixels(latents)
        except XditCompileError:
            raise
        except Exception:  # noqa: BLE001 - a pipeline that does not begin from latents, or not without steps
            log.info("this pipeline cannot show what there is after some of its steps")
            self._decoder = None
            return
        if self._shows:
            self.preview = (pixels.tobytes(), pixels.shape)


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
