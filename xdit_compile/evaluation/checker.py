"""Reading a scene back from an image, and judging whether it shows what a caption asks for."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image
from scipy import ndimage

from .drawing import shape_mask, stripe_shade
from .scenes import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Mention, Request

_FOREGROUND = 48.0
_LEAST_AREA = 0.004
_TEMPLATE = 48


@dataclasses.dataclass(frozen=True)
class Seen:
    """One thing found in an image: what it looks most like, and the middle of its box as shares of the sides."""

    colour: str
    shape: str
    size: str
    place: str
    middle: tuple[float, float]
    area: float


@dataclasses.dataclass(frozen=True)
class View:
    """What an image shows, the largest thing first."""

    background: str
    things: tuple[Seen, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Which of the things that a caption says are true of an image; what it does not say counts as true."""

    count: bool
    colour: bool
    shape: bool
    place: bool
    size: bool
    background: bool

    @property
    def right(self) -> bool:
        """As many things as asked for, of the right colours and shapes, where they were asked for."""
        return self.count and self.colour and self.shape and self.place


def look(image: np.ndarray) -> View:
    """Find the things in an image.

    Args:
        image: ``(height, width, 3)``, uint8, or floats from 0 to 1.

    Raises:
        ValueError: the image is of another form.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image of form (height, width, 3) is needed, not {image.shape}")
    pixels = image.astype(np.float32) * (1.0 if image.dtype == np.uint8 else 255.0)
    background = _background(pixels)
    grounds = np.array([BACKGROUNDS[background], stripe_shade(background)], np.float32)
    foreground = _distances(pixels, grounds).min(-1) > _FOREGROUND
    opened = ndimage.binary_opening(foreground, structure=np.ones((3, 3), bool), iterations=max(len(pixels) // 170, 1))
    labels, count = ndimage.label(opened, structure=np.ones((3, 3), bool))
    sizes = np.bincount(labels.ravel(), minlength=count + 1) / labels.size
    found = [_seen(pixels, foreground, labels == label) for label in range(1, count + 1) if sizes[label] > _LEAST_AREA]
    return View(background, tuple(sorted(found, key=lambda thing: -thing.area)))


def judge(request: Request, image: np.ndarray) -> Verdict:
    """Whether an image shows what was asked for; the form of the image is that of ``look``."""
    view = look(image)
    background = request.background is None or view.background == request.background
    if len(view.things) != len(request.mentions):
        return Verdict(False, False, False, False, False, background)
    orders = [view.things] if len(view.things) == 1 else [view.things, view.things[::-1]]
    verdicts = [_compare(request, things, background) for things in orders]
    return max(verdicts, key=lambda verdict: (verdict.right, sum(dataclasses.astuple(verdict))))


def _compare(request: Request, things: tuple[Seen, ...], background: bool) -> Verdict:
    pairs = list(zip(request.mentions, things, strict=True))
    return Verdict(
        count=True,
        colour=all(mention.colour == thing.colour for mention, thing in pairs),
        shape=all(mention.shape == thing.shape for mention, thing in pairs),
        place=all(_placed(mention, thing) for mention, thing in pairs) and _holds(request.relation, things),
        size=all(mention.size in (None, thing.size) for mention, thing in pairs),
        background=background,
    )


def _placed(mention: Mention, thing: Seen) -> bool:
    return mention.place in (None, thing.place)


def _holds(relation: str | None, things: tuple[Seen, ...]) -> bool:
    if relation is None:
        return True
    x, y = (one - other for one, other in zip(things[0].middle, things[1].middle, strict=True))
    across, down = RELATIONS[relation]
    return x * across > abs(y) if across else y * down > abs(x)


def _background(pixels: np.ndarray) -> str:
    edge = max(len(pixels) // 32, 1)
    border = np.concatenate(
        [part.reshape(-1, 3) for part in (pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:])]
    )
    names = list(BACKGROUNDS)
    shades = np.array([[BACKGROUNDS[name], stripe_shade(name)] for name in names], np.float32)
    nearest = _distances(border, shades.reshape(-1, 3)).argmin(-1) // 2
    return names[int(np.bincount(nearest, minlength=len(names)).argmax())]


def _seen(pixels: np.ndarray, foreground: np.ndarray, core: np.ndarray) -> Seen:
    mask = ndimage.binary_dilation(core, iterations=3) & foreground
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = mask.shape
    middle = (float((left + right) / 2 / width), float((top + bottom) / 2 / height))
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), np.float32)
    inner = ndimage.binary_erosion(core)
    colour = names[int(_distances(np.median(pixels[inner if inner.any() else core], 0), palette).argmin())]
    radius = max((bottom - top) / height, (right - left) / width) / 2
    return Seen(
        colour,
        _shape(mask[top:bottom, left:right]),
        min(SIZES, key=lambda size: abs(SIZES[size] - radius)),
        min(PLACES, key=lambda place: np.hypot(PLACES[place][0] - middle[0], PLACES[place][1] - middle[1])),
        middle,
        float(mask.mean()),
    )


def _shape(box: np.ndarray) -> str:
    found = np.asarray(Image.fromarray(box).convert("L").resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX)) / 255.0
    overlap = {
        name: np.minimum(found, template).sum() / np.maximum(found, template).sum()
        for name, template in _templates().items()
    }
    return max(overlap, key=lambda name: overlap[name])


@functools.lru_cache(maxsize=1)
def _templates() -> dict[str, np.ndarray]:
    templates = {}
    for name in SHAPES:
        mask = shape_mask(name, 4 * _TEMPLATE)
        rows, columns = (np.flatnonzero((mask > 127).any(axis)) for axis in (1, 0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        templates[name] = np.asarray(Image.fromarray(box).resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX)) / 255.0
    return templates


def _distances(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    return np.sqrt(((pixels[..., None, :] - palette) ** 2).sum(-1))
