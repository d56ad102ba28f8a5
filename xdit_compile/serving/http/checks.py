"""From a request's fields to the engine's work, with everything seen first that can be seen to be wrong."""

from __future__ import annotations

import ast
import difflib
import io
import json
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from xdit_compile.cli.inputs.annotations import Argument
from xdit_compile.errors import one_line
from xdit_compile.plan.nearest import nearest

from ..queue.messages import Work
from .problems import Problem
from .schemas import Asked, ImageRequest, VideoRequest
from .settings import Limits

SEEDS = 1 << 32
STEPS = 20
"""Steps that previews are spread over where a request leaves their number to the pipeline."""
_TAKEN = ("negative_prompt", "num_inference_steps", "guidance_scale", "max_sequence_length", "strength", "num_frames")
_OURS = {
    "generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt", "latents", "prompt",
    "height", "width", "args", "kwargs", *_TAKEN,
}  # fmt: skip
"""Arguments that other fields give, or the server itself."""


def arguments_of(takes: Iterable[str]) -> list[str]:
    """The names of a pipeline's arguments that a request may give among ``arguments``."""
    return [name for name in takes if name not in _OURS and "callback" not in name]


def public_name(model: str) -> str:
    """What is served, without the folders of this machine in which it lies."""
    return PurePath(model).name if model.startswith(("/", ".", "~")) else model


def work_of(
    asked: Asked, id: str, pictures: Mapping[str, bytes], model: str, facts: Mapping[str, Any], limits: Limits,
    latents: bytes | None = None,
) -> Work:  # fmt: skip
    """The engine's work for a request.

    Args:
        id: of the request.
        pictures: encoded files by the names of the pipeline's arguments.
        model: what is served.
        facts: about its pipeline.
        latents: a file of what is only to be decoded.

    Raises:
        Problem: it asks for what the pipeline does not take, or for too much.
    """
    _check_model(asked, model)
    _check_prompts(asked, limits)
    height, width = _size_of(asked)
    takes = set(facts.get("takes") or ())
    for name in _TAKEN:
        if getattr(asked, name, None) is not None and name not in takes:
            raise Problem(400, f"this pipeline does not take {name}; leave it out", name, "unsupported")
    if height is not None and not {"height", "width"} <= takes:
        raise Problem(400, "this pipeline does not take a height and width; leave the size out", "size", "unsupported")
    for name in pictures:
        if name not in takes:
            raise Problem(400, f"this pipeline does not take a picture as {name}", name, "unsupported")
    makes_latents = getattr(asked, "response_format", None) == "latents"
    if makes_latents or latents is not None:
        _check_begins_from_latents(takes)
    _check_arguments(asked.arguments, takes, limits)
    arguments = _as_taken(asked.arguments, facts.get("kinds") or {})
    images, frames = _counts(asked)
    _check_amounts(asked, (height, width), (images, frames), facts, limits)
    return Work(
        id, asked.prompt, asked.negative_prompt, height, width, asked.num_inference_steps, asked.guidance_scale,
        frames, asked.max_sequence_length, asked.strength, images,
        secrets.randbelow(SEEDS) if asked.seed is None else asked.seed,
        dict(pictures), arguments, _preview_every(asked, facts) if latents is None else 0, makes_latents, latents,
    )  # fmt: skip


def _check_model(asked: Asked, model: str) -> None:
    if asked.model is not None and asked.model not in (model, public_name(model)):
        message = f"the model {asked.model[:100]!r} is not served here; this is {public_name(model)!r}"
        raise Problem(404, message, "model", "model_not_found")


def _check_prompts(asked: Asked, limits: Limits) -> None:
    if not asked.prompt.strip():
        raise Problem(400, "prompt is empty; say what is to be seen", "prompt", "invalid_value")
    for name in ("prompt", "negative_prompt"):
        length = len((getattr(asked, name) or "").encode())
        if length > limits.prompt_bytes:
            message = f"{name} has {length} bytes; {limits.prompt_bytes} are the most"
            raise Problem(400, message, name, "string_above_max_length")


def _check_begins_from_latents(takes: set[str]) -> None:
    for name in ("latents", "output_type"):
        if name not in takes:
            message = (
                f"this pipeline takes no {name}, so that none are made or decoded; ask for the pictures themselves"
            )
            raise Problem(400, message, "response_format", "unsupported")


def _size_of(asked: Asked) -> tuple[int | None, int | None]:
    """Height and width in pixels, None for the pipeline's own."""
    if (asked.height is None) != (asked.width is None):
        missing = "width" if asked.width is None else "height"
        raise Problem(400, f"give {missing} too, or size as WIDTHxHEIGHT", missing, "invalid_value")
    if asked.size in (None, "auto"):
        return asked.height, asked.width
    width, height = map(int, str(asked.size).split("x"))
    if not height or not width:
        raise Problem(400, f"size {asked.size} has no pixels", "size", "invalid_value")
    if asked.height is not None and (asked.height, asked.width) != (height, width):
        raise Problem(400, f"size {asked.size} and {asked.width} x {asked.height} differ", "size", "invalid_value")
    return height, width


def _counts(asked: Asked) -> tuple[int, int | None]:
    """How many pictures, and how many frames of a video."""
    if isinstance(asked, ImageRequest):
        return asked.n or 1, None
    assert isinstance(asked, VideoRequest)
    if asked.seconds is None:
        return 1, asked.num_frames
    frames = max(1, round(float(asked.seconds) * asked.fps))
    if asked.num_frames not in (None, frames):
        raise Problem(400, f"seconds and fps make {frames} frames, not num_frames", "num_frames", "invalid_value")
    return 1, frames


def _check_amounts(
    asked: Asked, size: tuple[int | None, int | None], counts: tuple[int, int | None], facts: Mapping[str, Any],
    limits: Limits,
) -> None:  # fmt: skip
    images, frames = counts
    height, width = size if size[0] is not None else tuple(facts.get("size") or (0, 0))
    pixels = (height or 0) * (width or 0)
    many, frames = "n" if frames is None else "num_frames", frames or 1
    amounts = (
        ("size", max(height or 0, width or 0), limits.side, "pixels on a side"),
        ("size", pixels, limits.pixels, "pixels a picture"),
        ("n", images, limits.images, "pictures"),
        ("num_frames", frames, limits.frames, "frames"),
        (many, pixels * images * frames, limits.total_pixels, "pixels in all"),
        ("num_inference_steps", asked.num_inference_steps or 1, limits.steps, "steps"),
        ("max_sequence_length", asked.max_sequence_length or 1, limits.tokens, "tokens"),
    )
    for param, amount, most, what in amounts:
        if amount > most:
            raise Problem(400, f"{param} asks for {amount} {what}; {most} are the most", param, "above_maximum")


def _check_arguments(arguments: Mapping[str, Any], takes: set[str], limits: Limits) -> None:
    for name, value in arguments.items():
        param = f"arguments.{name[:100]}"
        if name in _OURS or "callback" in name:
            message = f"{name[:100]} is given by a field of its own, or by the server"
            raise Problem(400, message, param, "invalid_value")
        if name not in takes:
            near = nearest(name, takes - _OURS) or difflib.get_close_matches(name, takes - _OURS, n=1, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise Problem(400, f"this pipeline takes no argument {name[:100]!r}{hint}", param, "unknown_argument")
        if any(word in name for word in ("image", "video", "mask", "embeds")) and not isinstance(value, int | float):
            raise Problem(400, f"{name} is a picture or a tensor, which JSON does not hold", param, "unsupported")
        for problem in _plain_problems(value, limits.argument_depth, limits):
            raise Problem(400, f"{name} {problem}", param, "invalid_value")


def _as_taken(arguments: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values as the pipeline's call takes them, by what its source says that it takes."""
    taken = {}
    for name, value in arguments.items():
        annotation, default = [each and ast.parse(each, mode="eval").body for each in kinds.get(name, (None, None))]
        try:
            taken[name] = Argument(annotation, default).value(json.dumps(value))
        except ValueError as error:
            message = f"{name} {error}".replace(
                "which no text stands for; give it in Python", "which JSON does not hold"
            )
            raise Problem(400, message, f"arguments.{name}", "invalid_value") from None
    return taken


def _plain_problems(value: Any, depth: int, limits: Limits) -> Iterator[str]:
    """What is wrong with a value that should be plain data."""
    if depth < 0:
        yield "holds lists inside of lists inside of others, too many of them"
    elif isinstance(value, dict | list):
        if len(value) > limits.argument_items:
            yield f"holds {len(value)} values; {limits.argument_items} are the most"
            return
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _plain_problems(each, depth - 1, limits)
    elif isinstance(value, int | float) and not abs(value) <= limits.argument_number:
        yield f"holds a number beyond {limits.argument_number:g}"
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            yield "holds half a character"


def _preview_every(asked: Asked, facts: Mapping[str, Any]) -> int:
    """Steps between two previews."""
    if not (isinstance(asked, ImageRequest) and asked.stream and asked.partial_images):
        return 0
    steps = asked.num_inference_steps or facts.get("steps") or STEPS
    return max(1, int(steps) // (asked.partial_images + 1))


def check_picture(data: bytes, param: str, limits: Limits) -> None:
    """See that a file is one whole picture that may be read, before all of it is; takes a while.

    Raises:
        Problem: it is not.
    """
    from PIL import Image

    if len(data) > limits.picture_bytes:
        message = f"{param} has {len(data)} bytes; {limits.picture_bytes} are the most"
        raise Problem(413, message, param, "too_large")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                pixels, moves = image.width * image.height, getattr(image, "is_animated", False)
                if pixels <= limits.picture_pixels and not moves:
                    image.verify()
            if pixels <= limits.picture_pixels and not moves:
                with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                    image.load()
    except Image.DecompressionBombError:
        raise Problem(400, f"{param} has far too many pixels", param, "above_maximum") from None
    except Exception as error:
        message = f"{param} is no whole PNG, JPEG or WebP file"
        raise Problem(400, message, param, "invalid_image") from error
    if pixels > limits.picture_pixels:
        message = f"{param} has {pixels} pixels; {limits.picture_pixels} are the most"
        raise Problem(400, message, param, "above_maximum")
    if moves:
        raise Problem(400, f"{param} has several pictures; send one", param, "invalid_image")


def check_latents(data: bytes) -> None:
    """See that a file is one of latents, whose values ranks look at.

    Raises:
        Problem: it is not.
    """
    from safetensors import SafetensorError, deserialize

    try:
        names = [name for name, _ in deserialize(data)]
    except SafetensorError as error:
        raise Problem(400, f"latents are no safetensors file: {one_line(error)}", "latents", "invalid_value") from error
    if names != ["latents"]:
        message = "latents are a file of other tensors than one that is called latents"
        raise Problem(400, message, "latents", "invalid_value")
