"""What a server's front and its ranks tell each other; plain data, without PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

State = Literal["waits", "done", "failed", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Work:
    """One request for pictures or a video.

    Args:
        id: of the request; the same on all ranks.
        prompt, negative_prompt: texts; a negative one of None leaves that to the pipeline.
        height, width: in pixels; None for the pipeline's own.
        num_inference_steps, guidance_scale, num_frames, max_sequence_length, strength: the pipeline's own where None.
        num_images: how many pictures.
        seed: of the first picture; each next one has one more.
        pictures: encoded files by the names of fields, ``image``, ``mask_image`` and ``control_image``.
        arguments: further ones of the pipeline's call.
        preview_every: decode what there is after every so many steps; 0 never.
        makes_latents: stop before the pipeline decodes what it made.
        latents: a safetensors file of what such a request made, which is decoded without a step; None for a request
            that makes its own.
    """

    id: str
    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None
    strength: float | None = None
    num_images: int = 1
    seed: int = 42
    pictures: dict[str, bytes] = dataclasses.field(default_factory=dict)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    preview_every: int = 0
    makes_latents: bool = False
    latents: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """What all ranks do next, in this order.

    Args:
        start: requests that begin, and go on to their first call.
        cancel: requests that end where they wait.
        run: requests whose calls are answered, as one where that can be, and which then go on to their next.
    """

    start: tuple[Work, ...] = ()
    cancel: tuple[str, ...] = ()
    run: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Told:
    """What became of one request in a turn.

    Args:
        state: whether it waits for its next call, is done, failed, or was cancelled.
        key: calls of equal keys may join.
        step: steps of the scheduler that it made.
        steps: how many it will make in all, where that is known.
        error: why it failed, in one line.
        kind: ``input`` where the pipeline refused what it was given, else ``internal``.
        pictures: on rank 0, what it made: raw bytes, uint8 ``[N, H, W, C]`` or ``[N, F, H, W, C]``.
        shape: of ``pictures``.
        latents: on rank 0, a safetensors file in place of pictures, where these were asked for.
        preview: on rank 0, the same of what there is so far, and its shape.
    """

    state: State
    key: str = ""
    step: int = 0
    steps: int | None = None
    error: str = ""
    kind: str = ""
    pictures: bytes | None = None
    shape: tuple[int, ...] = ()
    latents: bytes | None = None
    preview: tuple[bytes, tuple[int, ...]] | None = None

    @property
    def compared(self) -> tuple[Any, ...]:
        """What must be the same on all ranks; keys may hold digests of values that differ by rounding."""
        return self.state, self.step, self.kind


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a rank takes, in bytes.

    Args:
        resident: of memory, that the process holds.
        device_memory: on its accelerator; 0 without one.
        sent: to other ranks in calls of the denoiser since it has its plan, counted in the graphs that it runs.
    """

    resident: int = 0
    device_memory: int = 0
    sent: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """A rank's answer to a turn.

    Args:
        rank: whose.
        told: by the ids of all requests that began, went on or ended in it.
        seconds: spent in the turn, by phase: ``begin`` (texts, first latents), ``denoiser``, ``between`` (schedulers,
            previews) and ``decode`` (after the last call); all is ``denoiser`` where no calls of requests alternate.
        usage: after it.
    """

    rank: int
    told: dict[str, Told]
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    usage: Usage = Usage()


@dataclasses.dataclass(frozen=True)
class Regroup:
    """A rank that has nothing to do leaves its gang and forms another, under another plan, with the weights it has.

    Args:
        arrangement: by its name.
        rank, size: its place in the gang, and how many there are.
        port: of this machine, where they meet.
    """

    arrangement: str
    rank: int
    size: int
    port: int


@dataclasses.dataclass(frozen=True)
class Hello:
    """The first word of a process.

    Args:
        rank: which it is.
    """

    rank: int


@dataclasses.dataclass(frozen=True)
class Ready:
    """A rank has the pipeline under a plan.

    Args:
        rank: whose.
        facts: about the pipeline: ``class``, ``makes`` (``images`` or ``videos``), ``takes`` (names of the arguments of
            its call), ``kinds`` (annotation and default of each, as source), ``joins`` (whether calls may join),
            ``device``, ``dtype``, and where they are known ``size`` (height, width) and ``steps``.
        seconds: that this took.
        usage: before its first turn.
    """

    rank: int
    facts: dict[str, Any]
    seconds: float
    usage: Usage = Usage()


@dataclasses.dataclass(frozen=True)
class Lost:
    """A rank cannot go on.

    Args:
        rank: whose.
        error: why, in one line.
    """

    rank: int
    error: str
