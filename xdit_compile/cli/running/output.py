"""From what a pipeline returned to pixels, files and differences."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from xdit_compile.errors import XditCompileError

VIDEO_SUFFIXES = (".mp4", ".gif")


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
    """How far two results lie apart; latents have no pixels."""

    pixel: int | None
    absolute: float
    relative: float

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
    if name == "frames" and values.ndim == 4:
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
    for name in ("images", "frames"):
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
    pixel = None
    if isinstance(one, Pixels) and isinstance(other, Pixels):
        pixel = int(np.abs(one.bytes().astype(np.int16) - other.bytes().astype(np.int16)).max())
    return Difference(pixel, absolute, absolute / max(float(np.abs(other.values).max()), 1e-12))


def write(made: Pixels | Latents, output: str, fps: int) -> list[Path]:
    """Write every image or video and return the files: ``out.png``, then ``out-1.png`` and so on; latents in one.

    A suffix that does not suit (a video as PNG) is replaced by .mp4 or .png. A file appears whole or not at all.
    """
    path = Path(output)
    if isinstance(made, Latents):
        with whole_file(path) as temporary:
            save_file({"latents": np.ascontiguousarray(made.values)}, temporary)
        return [path]
    return _write_pictures(made, path, fps)


def _write_pictures(pixels: Pixels, path: Path, fps: int) -> list[Path]:
    if pixels.is_video != (path.suffix.lower() in VIDEO_SUFFIXES):
        path = path.with_suffix(".mp4" if pixels.is_video else ".png")
    written = []
    for index, item in enumerate(pixels.bytes()):
        target = path if index == 0 else path.with_name(f"{path.stem}-{index}{path.suffix}")
        with whole_file(target) as temporary:
            (_write_video if pixels.is_video else _write_image)(item, temporary, fps)
        written.append(target)
    return written


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to; the target appears, whole, once the block ends without an error."""
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_image(item: np.ndarray, path: Path, fps: int) -> None:
    from PIL import Image

    image = Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item)
    (image.convert("RGB") if path.suffix.lower() in (".jpg", ".jpeg") else image).save(path)


def _write_video(frames: np.ndarray, path: Path, fps: int) -> None:
    from PIL import Image

    if path.suffix.lower() == ".gif":
        first, *rest = [Image.fromarray(frame) for frame in frames]
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        return
    import imageio

    writer: Any = imageio.get_writer(path, fps=fps, macro_block_size=1)
    with writer:
        for frame in frames:
            writer.append_data(_even(frame))


def _even(frame: np.ndarray) -> np.ndarray:
    """H.264 in 4:2:0 needs even sides: repeat the last row or column where one is odd."""
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _array(content: Any) -> np.ndarray:
    if hasattr(content, "detach"):
        return content.detach().float().cpu().numpy()
    if isinstance(content, list | tuple):
        return np.stack([_array(item) for item in content])
    array = np.asarray(content)
    return array.astype(np.float32) / 255 if array.dtype == np.uint8 else array.astype(np.float32)
