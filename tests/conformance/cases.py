"""All cases by name, and the module that each is defined in."""

from __future__ import annotations

from types import ModuleType

from conformance import images, pictures, prompted, transformers, unets, videos
from conformance.case import Case

_FAMILIES: tuple[tuple[ModuleType, list[Case]], ...] = (
    (images, images.IMAGES),
    (transformers, transformers.TRANSFORMERS),
    (pictures, pictures.PICTURES),
    (prompted, prompted.PROMPTED),
    (unets, unets.UNETS),
    (videos, videos.VIDEOS),
)

CASES: dict[str, Case] = {case.name: case for _, cases in _FAMILIES for case in cases}
MODULES: dict[str, ModuleType] = {case.name: module for module, cases in _FAMILIES for case in cases}
