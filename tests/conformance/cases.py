"""All cases by name, and the module that each is defined in."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from conformance import coders, denoisers, further, images, pictures, prompted, transformers, unets, variants, videos
from conformance.observe import Subject

_FAMILIES: tuple[tuple[ModuleType, Sequence[Subject]], ...] = (
    (images, images.IMAGES),
    (transformers, transformers.TRANSFORMERS),
    (pictures, pictures.PICTURES),
    (prompted, prompted.PROMPTED),
    (unets, unets.UNETS),
    (videos, videos.VIDEOS),
    (variants, variants.VARIANTS),
    (further, further.FURTHER),
    (denoisers, denoisers.MODULES),
    (coders, [*coders.CODERS, *coders.DECODERS]),
)

CASES: dict[str, Subject] = {case.name: case for _, cases in _FAMILIES for case in cases}
MODULES: dict[str, ModuleType] = {case.name: module for module, cases in _FAMILIES for case in cases}
