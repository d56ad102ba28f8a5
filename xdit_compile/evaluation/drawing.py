"""Scenes as images."""

from __future__ import annotations

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from .scenes import BACKGROUNDS, COLOURS, Scene, Thing

_FINER = 4
_STRIPES = 8
_SHADE = 0.88


def draw(scene: Scene, side: int) -> np.ndarray:
    """The scene as pixels: ``(side, side, 3)``, uint8, with smooth edges."""
    image = Image.fromarray(_ground(scene, side))
    for thing in scene.things:
        _paste(image, thing, scene.tint)
    return np.asarray(image)


def stripe_shade(background: str) -> tuple[int, int, int]:
    """The darker colour of a striped background (the lighter one where the ground is black)."""
    red, green, blue = BACKGROUNDS[background]
    if background == "black":
        return (50, 50, 50)
    return (round(red * _SHADE), round(green * _SHADE), round(blue * _SHADE))


def shape_mask(shape: str, side: int) -> np.ndarray:
    """Coverage of a shape that fills a square: ``(side, side)``, uint8, 0 to 255."""
    return np.asarray(_mask(shape, side))


def _ground(scene: Scene, side: int) -> np.ndarray:
    ground = np.empty((side, side, 3), np.uint8)
    ground[:] = BACKGROUNDS[scene.background]
    if scene.striped:
        rows = np.arange(side) * 2 * _STRIPES // side % 2 == 1
        ground[rows] = stripe_shade(scene.background)
    return ground


def _paste(image: Image.Image, thing: Thing, tint: tuple[int, ...]) -> None:
    side = image.width
    size = max(round(2 * thing.radius * side), 3)
    corner = tuple(round(at * side - size / 2) for at in thing.middle)
    colour = tuple(min(max(value + shift, 0), 255) for value, shift in zip(COLOURS[thing.colour], tint, strict=True))
    image.paste(Image.new("RGB", (size, size), colour), (corner[0], corner[1]), _mask(thing.shape, size))


@functools.lru_cache(maxsize=1024)
def _mask(shape: str, size: int) -> Image.Image:
    fine = Image.new("L", (size * _FINER, size * _FINER))
    canvas, far = ImageDraw.Draw(fine), size * _FINER - 1

    def polygon(points: list[tuple[float, float]]) -> None:
        canvas.polygon([(x * far, y * far) for x, y in points], fill=255)

    if shape == "circle":
        canvas.ellipse((0, 0, far, far), fill=255)
    elif shape == "ring":
        canvas.ellipse((0, 0, far, far), fill=255)
        canvas.ellipse((0.27 * far, 0.27 * far, 0.73 * far, 0.73 * far), fill=0)
    elif shape == "square":
        canvas.rectangle((0, 0, far, far), fill=255)
    elif shape == "triangle":
        polygon([(0.5, 0.02), (1, 0.95), (0, 0.95)])
    elif shape == "diamond":
        polygon([(0.5, 0), (0.92, 0.5), (0.5, 1), (0.08, 0.5)])
    elif shape == "cross":
        canvas.rectangle((0.34 * far, 0, 0.66 * far, far), fill=255)
        canvas.rectangle((0, 0.34 * far, far, 0.66 * far), fill=255)
    elif shape == "star":
        turns = [(math.pi * (turn / 5 - 0.5), 0.53 if turn % 2 == 0 else 0.23) for turn in range(10)]
        polygon([(0.5 + out * math.cos(angle), 0.54 + out * math.sin(angle)) for angle, out in turns])
    elif shape == "heart":
        polygon(_heart())
    else:
        raise ValueError(f"no such shape: {shape}")
    return fine.resize((size, size), Image.Resampling.BOX)


def _heart() -> list[tuple[float, float]]:
    points = []
    for step in range(96):
        t = 2 * math.pi * step / 96
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + x / 33, 0.47 - y / 31))
    return points
