"""Text to image by transformers."""

from __future__ import annotations

from conformance.case import Case, repeated
from conformance.parts import CLIP, IMAGE, known, picture
from zoo.pipelines import PIPELINES
from zoo.transformers import Draw


def _controlled(d: Draw, request: int) -> dict:
    given = {**PIPELINES["sd3_controlnet"].arguments(d), **IMAGE[request]}
    return {**given, "control_image": picture(d, IMAGE[request])}


IMAGES: list[Case] = [
    known("flux", IMAGE[1]),
    known("flux_true_cfg", IMAGE[1]),
    known("sd3", IMAGE[1], pair=repeated),
    known("sd3_controlnet", pair=repeated, arguments=_controlled),
    known("pixart", IMAGE[1]),
    known("hunyuandit", IMAGE[1], pair=repeated),
    known("cogvideox", CLIP[1], pair=repeated),
    known("latte", IMAGE[1]),
    known("wan", CLIP[1]),
    known("qwenimage", IMAGE[1]),
    known("sana", {"height": 160, "width": 288}),
    known("dit", {"class_labels": [5]}, pair=lambda given: {**given, "class_labels": given["class_labels"] + [7]}),
    known("ltx", {"height": 128, "width": 160}, pair=repeated),
    known("sd15", IMAGE[1]),
    known("sdxl", {"height": 80, "width": 144}),
]
