"""Latents as what one request makes and another one decodes, where both together are exactly what one call does.

A pipeline decodes latents where its call takes them and its loop makes no steps. Whether nothing else becomes of
them on the way is not known beforehand. It is tried with random ones: asked for latents, such a call has to give the
very ones back that it was given, and asked for pixels, the same for every seed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from xdit_compile.cli.options.result_kind import IMAGES
from xdit_compile.cli.running.output import pixels_of
from xdit_compile.cli.running.pipeline_call import call_pipeline
from xdit_compile.errors import AgreementError, UsageError, XditCompileError, one_line
from xdit_compile.runtime.diffusers_pipeline import there
from xdit_compile.serving.queue.messages import Work

NAME = "latents"
"""Of the tensor in a file, and of the argument of a pipeline's call."""
INSTEAD = "ask for the pictures themselves"
_TRIALS = 256
_OTHER_SEED = 1


@dataclasses.dataclass(frozen=True)
class Form:
    """What the latents of a request are.

    Args:
        shape: as the pipeline has them where it asks for latents.
        dtype: of their elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class Forms:
    """What was tried of requests, on all ranks alike."""

    def __init__(self) -> None:
        self._known: dict[Any, Form | str] = {}

    def get(self, key: Any) -> Form | str | None:
        """The form of a request's latents, or why they cannot be had; None where that was not tried."""
        return self._known.get(key)

    def put(self, key: Any, verdict: Form | str) -> None:
        """Keep what a trial showed; all is forgotten where there is too much of it."""
        if len(self._known) >= _TRIALS:
            self._known.clear()
        self._known[key] = verdict


class Decoder:
    """What a pipeline makes of latents in no steps at all.

    Args:
        pipe: whose call takes ``latents``.
        arguments: of its call.
        seeds: as `call_pipeline` takes them.
    """

    def __init__(self, pipe: Any, arguments: dict[str, Any], seeds: int | Sequence[int]):
        self._pipe, self._arguments, self._seeds = copy.copy(pipe), arguments, seeds
        self._pipe.scheduler = _without_steps(pipe.scheduler)

    def pixels(self, latents: torch.Tensor) -> np.ndarray:
        """Pixels as uint8, ``[N, H, W, C]`` or ``[N, F, H, W, C]``."""
        made, _ = call_pipeline(self._pipe, {**self._arguments, NAME: latents}, self._seeds)
        return pixels_of(made).bytes()

    def passed(self, latents: torch.Tensor) -> torch.Tensor:
        """What it gives back where it is asked for latents.

        Raises:
            XditCompileError: no tensor of images.
        """
        arguments = {**self._arguments, NAME: latents, "output_type": "latent"}
        return tensor_of(call_pipeline(self._pipe, arguments, self._seeds)[0])


def form_of(pipe: Any, arguments: dict[str, Any], seeds: int | Sequence[int]) -> Form | str:
    """The form of what a call makes before it decodes, or why that cannot be decoded by another; makes no steps.

    Raises:
        Exception: what the call itself raises before it has its first latents.
    """
    if not hasattr(pipe, "prepare_latents") or getattr(pipe, "scheduler", None) is None:
        return f"this pipeline does not say what latents it begins with; {INSTEAD}"
    first = _first_latents(pipe, arguments, seeds)
    if not (isinstance(first, torch.Tensor) and first.is_floating_point()):
        return f"this pipeline's latents are no single tensor of numbers; {INSTEAD}"
    drawn = torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first.device, first.dtype)
    others = [seed + _OTHER_SEED for seed in ([seeds] if isinstance(seeds, int) else seeds)]
    try:
        decoder = Decoder(pipe, arguments, seeds)
        if not _equal(decoder.passed(drawn), drawn):
            return f"this pipeline gives latents back changed, so that they are not decoded exactly; {INSTEAD}"
        other = Decoder(pipe, arguments, others[0] if isinstance(seeds, int) else others)
        if not np.array_equal(decoder.pixels(drawn), other.pixels(drawn)):
            return f"this pipeline draws random numbers when it decodes; {INSTEAD}"
    except (AgreementError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - a pipeline that does not begin from latents, or not without steps
        return f"this pipeline cannot begin from latents ({one_line(error)}); {INSTEAD}"
    return Form(tuple(first.shape), first.dtype)


def key_of(work: Work, sizes: dict[str, tuple[int, int]]) -> Any:
    """What requests have in common whose latents are alike: all but texts, seeds and the values of pictures.

    Args:
        sizes: of the pictures, by the names of arguments.
    """
    negative = None if work.negative_prompt is None else ""
    alike = dataclasses.replace(
        work, id="", prompt="", negative_prompt=negative, seed=0, pictures={}, preview_every=0, makes_latents=False,
        latents=None,
    )  # fmt: skip
    return repr(alike), tuple(sorted(sizes.items()))


def written(latents: torch.Tensor) -> bytes:
    """Latents as a file."""
    from safetensors.torch import save

    return save({NAME: latents.detach().cpu().contiguous()})


def read(data: bytes, form: Form) -> torch.Tensor:
    """The latents in a file, on the CPU, in the dtype of a request's own.

    Raises:
        UsageError: the file does not hold what a request of this form makes.
    """
    from safetensors.torch import load

    try:
        tensors = load(data)
    except Exception as error:
        raise UsageError(f"latents are no safetensors file: {one_line(error)}") from error
    if list(tensors) != [NAME]:
        raise UsageError(f"latents are a file of {', '.join(sorted(tensors)) or 'nothing'}, not of one tensor {NAME}")
    latents = tensors[NAME]
    if tuple(latents.shape) != form.shape:
        raise UsageError(f"latents have the shape {list(latents.shape)}, those of this request {list(form.shape)}")
    if not latents.is_floating_point():
        raise UsageError(f"latents are {_name(latents.dtype)}, those of this request {_name(form.dtype)}")
    if not bool(torch.isfinite(latents).all()):
        raise UsageError("latents hold values that are not finite")
    same = latents.to(form.dtype)
    if not torch.equal(same.to(latents.dtype), latents):
        raise UsageError(f"latents are {_name(latents.dtype)} and would be rounded to {_name(form.dtype)}")
    return same


def tensor_of(result: Any) -> torch.Tensor:
    """The latents in a pipeline's result, as a plain tensor; to be called before the request of its call is over.

    Raises:
        XditCompileError: there are none, or values that are not finite.
    """
    latents = next((each for name in IMAGES if (each := getattr(result, name, None)) is not None), None)
    if not isinstance(latents, torch.Tensor):
        raise XditCompileError(f"the pipeline returned no tensor of latents; {INSTEAD}")
    latents = there(latents)
    if not bool(torch.isfinite(latents).all()):
        raise XditCompileError("the latents hold values that are not finite; try --dtype float32 or another backend")
    return latents


def own_pipeline(pipe: Any) -> Any:
    """A shallow copy with a scheduler of its own, which keeps the state of one loop."""
    copied = copy.copy(pipe)
    for name, component in pipe.components.items():
        if hasattr(component, "set_timesteps"):
            setattr(copied, name, copy.deepcopy(component))
    return copied


class _Begun(BaseException):
    """Raised where a call has its first latents; no ``Exception``, which pipelines might catch."""

    def __init__(self, latents: Any):
        super().__init__()
        self.latents = latents


def _first_latents(pipe: Any, arguments: dict[str, Any], seeds: int | Sequence[int]) -> Any:
    """What a call begins with, where its pipeline prepares that by the method that those of diffusers have."""
    begun = own_pipeline(pipe)
    prepare = begun.prepare_latents

    @functools.wraps(prepare)
    def prepared(*args: Any, **kwargs: Any) -> Any:
        made = prepare(*args, **kwargs)
        raise _Begun(made[0] if isinstance(made, tuple) else made)

    begun.prepare_latents = prepared
    try:
        call_pipeline(begun, arguments, seeds)
    except _Begun as error:
        return error.latents
    return None


class _NotGoneThrough(torch.Tensor):
    """Timesteps, and any slice of them, that loops do not go through; all else that is made of them is as ever.

    There are as many as ever, since pipelines refuse to make none.
    """

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.clone().as_subclass(type(self))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        if not isinstance(made, torch.Tensor):
            return made
        return made.as_subclass(cls if func in (torch.Tensor.__getitem__, torch.Tensor.to) else torch.Tensor)


def _without_steps(scheduler: Any) -> Any:
    """A scheduler of the same kind that makes none, and takes latents as they are."""
    kind = type(scheduler)

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.set_timesteps(self, *args, **kwargs)
        self.timesteps = self.timesteps.as_subclass(_NotGoneThrough)

    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("it makes steps whatever its scheduler says")

    functools.update_wrapper(set_timesteps, kind.set_timesteps)
    functools.update_wrapper(step, kind.step)
    methods = {"set_timesteps": set_timesteps, "step": step, "init_noise_sigma": 1.0}
    none: Any = type(kind.__name__, (kind,), methods)
    return none.from_config(scheduler.config)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
