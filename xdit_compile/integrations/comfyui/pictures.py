"""Pictures and latents of ComfyUI as files for a server, and back; and whether sizes fit."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

Size = tuple[int, int]
"""Width and height in pixels."""


def file_of(name: str, picture: torch.Tensor) -> bytes:
    """A PNG file of a picture.

    Args:
        name: of the input, for the error.
        picture: floats from 0 to 1: ``[1, H, W, C]`` of an ``IMAGE``, or ``[1, H, W]`` or ``[H, W]`` of a ``MASK``.

    Raises:
        ValueError: there are several pictures.
    """
    if picture.ndim > 2 and picture.shape[0] != 1:
        raise ValueError(f"{name} has {picture.shape[0]} pictures; give one, as ImageFromBatch takes it out")
    pixels = (picture.squeeze(0) if picture.ndim > 2 else picture).clamp(0, 1).mul(255).round().byte().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def picture_of(text: str) -> Image.Image:
    """The picture in a field of base64, with three channels, or four where it is transparent."""
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    return picture if picture.mode in ("RGB", "RGBA") else picture.convert("RGB")


def batch_of(text: str) -> torch.Tensor:
    """The pixels in a field with a safetensors file in base64 as an ``IMAGE``, float32 ``[N, H, W, C]`` from 0 to 1."""
    pixels = load(base64.b64decode(text))["pixels"].to(torch.float32).div_(255)
    return pixels.expand(*pixels.shape[:-1], 3) if pixels.shape[-1] == 1 else pixels


def latents_of(text: str) -> torch.Tensor:
    """The tensor of a field with a safetensors file in base64, as the server made it."""
    return load(base64.b64decode(text))["latents"]


def latents_file(latents: torch.Tensor) -> bytes:
    """A safetensors file for the server.

    Raises:
        ValueError: they are no tensor that can be written.
    """
    try:
        return save({"latents": latents.detach().cpu().contiguous()})
    except (SafetensorError, AttributeError) as error:
        raise ValueError(f"these latents cannot be sent: {error}") from error


def size_for(asked: Size, pictures: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> Size | None:
    """The size to ask for; None for the pipeline's own.

    Args:
        asked: by the user; zeros for that of the pictures, or the pipeline's own.
        pictures: that are given, by the names of the inputs.
        facts: about the pipeline.

    Raises:
        ValueError: one of two is zero, or a picture has another size.
    """
    if (asked[0] == 0) != (asked[1] == 0):
        raise ValueError(f"width {asked[0]} and height {asked[1]}: give both, or 0 for both")
    sizes = {name: _size_of(picture) for name, picture in pictures.items()}
    wanted, whose = asked, "the size asked for is"
    if not asked[0] and sizes:
        name, wanted = next(iter(sizes.items()))
        whose = f"{name} is"
    for name, size in sizes.items():
        if size != wanted:
            rest = "; scale it (ImageScale)" + (", or set width and height to 0" if asked[0] else "")
            raise ValueError(f"{name} is {size[0]} x {size[1]}, and {whose} {wanted[0]} x {wanted[1]}{rest}")
    takes_size = {"height", "width"} <= set(facts.get("takes", ()))
    return wanted if wanted[0] and (asked[0] or takes_size) else None


def _size_of(picture: torch.Tensor) -> Size:
    height, width = picture.shape[1:3] if picture.ndim > 2 else picture.shape
    return width, height
