"""Pixels become files: PNG, JPEG, WebP, MP4, with what they were made with; for a thread of their own."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "mp4": "video/mp4"}
_DESCRIPTION = 0x010E
_EXIF_BYTES = 60_000
"""A segment of a JPEG file has 65,533 bytes at most."""


def pixels_of(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Raw bytes as an array, uint8."""
    import numpy as np

    return np.frombuffer(data, np.uint8).reshape(shape)


def tensor_file(name: str, values: np.ndarray) -> bytes:
    """A safetensors file of one tensor."""
    import numpy as np
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(values)})


def encode_images(
    pixels: np.ndarray, format: str, quality: int | None = None, about: Sequence[Mapping[str, Any]] = ()
) -> list[bytes]:
    """Files of pictures.

    Args:
        pixels: uint8 ``[N, H, W, C]``.
        format: ``png``, ``jpeg`` or ``webp``.
        quality: of the last two, 0 to 100.
        about: what each was made with; plain data.
    """
    facts = [*about, *[{}] * (len(pixels) - len(about))]
    return [_encoded(item, format, quality, fact) for item, fact in zip(pixels, facts, strict=True)]


def _encoded(item: np.ndarray, format: str, quality: int | None, facts: Mapping[str, Any]) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    picture, buffer = Image.fromarray(item[..., 0] if item.shape[-1] == 1 else item), io.BytesIO()
    if format == "png":
        texts = PngInfo()
        for name, value in facts.items():
            texts.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
        picture.save(buffer, "PNG", pnginfo=texts, compress_level=3)
        return buffer.getvalue()
    exif = Image.Exif()
    if text := _described(facts, _EXIF_BYTES):
        exif[_DESCRIPTION] = text
    mode = "RGB" if format == "jpeg" and picture.mode != "L" else picture.mode
    picture.convert(mode).save(buffer, format.upper(), quality=95 if quality is None else quality, exif=exif)
    return buffer.getvalue()


def encode_video(frames: np.ndarray, fps: int, about: Mapping[str, Any]) -> bytes:
    """An MP4 file.

    Args:
        frames: uint8 ``[F, H, W, C]``.
        fps: frames per second.
        about: what it was made with.
    """
    import numpy as np
    from imageio_ffmpeg import write_frames

    height, width = frames.shape[1:3]
    even = np.pad(frames[..., :3], ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    size = even.shape[2], even.shape[1]
    text = _described(about, _EXIF_BYTES)
    with tempfile.TemporaryDirectory(prefix="xdit-compile-") as folder:
        file = Path(folder) / "video.mp4"
        tags = ["-metadata", f"comment={text}"] if text else []
        writer: Any = write_frames(str(file), size, fps=fps, macro_block_size=1, output_params=tags)
        writer.send(None)
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        return file.read_bytes()


def _described(facts: Mapping[str, Any], limit: int) -> str:
    """Facts as JSON; texts are left out of what is longer than ``limit``."""
    text = json.dumps(dict(facts)) if facts else ""
    if len(text) > limit:
        text = json.dumps({name: value for name, value in facts.items() if len(json.dumps(value)) < 1000})
    return text if len(text) <= limit else ""
