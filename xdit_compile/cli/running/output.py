"""From what a pipeline returned to pixels, latents and differences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from xdit_compile.cli.options.result_kind import IMAGES, VIDEOS
from xdit_compile.errors import XditCompileError


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Images ``[N, H, W, C]`` or videos ``[N, F, H, W, C]`` as float32 in 0..1."""

    values: np.ndarray

    @property
    def is_video(self) -> bool:
        """Whether there is a frame axis."""
        return self.values.ndim == 5

    def bytes(self) -> np.ndarray:
        """The same as uint8, rounded as diffusers rounds."""
        return (self.values * 255).round().astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Latents:
    """What a pipeline makes before its autoencoder decodes it, as float32 in the pipeline's own shape."""

    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two results lie apart; latents have no pixels, and what is equal in all of them no PSNR (dB)."""

    pixel: int | None
    absolute: float
    relative: float
    psnr: float | None = None

    def __str__(self) -> str:
        pixels = "" if self.pixel is None else f"{self.pixel} of 255 in the pixels, "
        return (
            f"greatest difference {pixels}{self.absolute:.2e} in the float output "
            f"({self.relative:.2e} of its greatest value)"
        )


def pixels_of(result: Any) -> Pixels:
    """The pixels in a pipeline's result: its ``images`` or its ``frames``, as arrays, tensors or PIL images.

    Raises:
        XditCompileError: it holds neither, or values that are not finite.
    """
    name, values = _content(result)
    if name in VIDEOS and values.ndim == 4:
        values = values[None]
    if values.ndim not in (4, 5):
        raise XditCompileError(f"the pipeline returned {name} of shape {list(values.shape)}, which is no picture")
    if values.shape[-1] not in (1, 3, 4) and values.shape[-3] in (1, 3, 4):
        values = np.moveaxis(values, -3, -1)
    return Pixels(_finite(values))


def latents_of(result: Any) -> Latents:
    """The latents in the result of a pipeline that was asked for them.

    Raises:
        XditCompileError: it holds neither images nor frames, or values that are not finite.
    """
    return Latents(_finite(_content(result)[1]))


def _content(result: Any) -> tuple[str, np.ndarray]:
    for name in (*IMAGES, *VIDEOS):
        content = getattr(result, name, None)
        if content is not None:
            return name, _array(content)
    raise XditCompileError("the pipeline returned neither images nor frames; only images and videos can be written")


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise XditCompileError("the result holds values that are not finite; try --dtype float32 or another backend")
    return values


def difference(one: Pixels | Latents, other: Pixels | Latents) -> Difference:
    """How far ``one`` lies from the reference ``other``.

    Raises:
        XditCompileError: their shapes differ.
    """
    if one.values.shape != other.values.shape:
        raise XditCompileError(
            f"split and unsplit results differ in shape: {list(one.values.shape)} and {list(other.values.shape)}"
        )
    absolute = float(np.abs(one.values - other.values).max())
    pixel = psnr = None
    if isinstance(one, Pixels) and isinstance(other, Pixels):
        apart = np.abs(one.bytes().astype(np.int16) - other.bytes().astype(np.int16))
        pixel, squares = int(apart.max()), float(np.square(apart, dtype=np.float64).mean())
        psnr = 10 * math.log10(255**2 / squares) if squares else None
    return Difference(pixel, absolute, absolute / max(float(np.abs(other.values).max()), 1e-12), psnr)


def _array(content: Any) -> np.ndarray:
    if hasattr(content, "detach"):
        return content.detach().float().cpu().numpy()
    if isinstance(content, list | tuple):
        return np.stack([_array(item) for item in content])
    array = np.asarray(content)
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32)
