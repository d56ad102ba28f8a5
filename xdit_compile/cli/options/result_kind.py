"""Whether a pipeline makes images or videos, read in the source of its call: nothing is imported or loaded."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from xdit_compile.cli.inputs.call_source import call_in_folder, call_of

IMAGES = ("images", "image")
VIDEOS = ("frames", "video", "videos")
"""How fields of a pipeline's result are called that hold pictures."""
KINDS = {"images": IMAGES, "videos": VIDEOS}


def kind_in_folder(folder: Path) -> str | None:
    """What the pipeline of a folder makes: ``images``, ``videos``, or else the names of what it returns.

    ``None`` where its source does not say it.
    """
    call = call_in_folder(folder)
    return None if call is None else _kind(call)


def kind_of(pipeline: Any) -> str | None:
    """The same of a pipeline that is loaded."""
    call = call_of(pipeline)
    return None if call is None else _kind(call)


def _kind(call: ast.AST) -> str | None:
    """What the results are made with that a call returns: ``return Output(images=image)``."""
    made = [node.value for node in ast.walk(call) if isinstance(node, ast.Return) and isinstance(node.value, ast.Call)]
    names = {word.arg for each in made for word in each.keywords if word.arg}
    fitting = [kind for kind, fields in KINDS.items() if names & set(fields)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting or not names or any(each.args for each in made):
        return None
    return ", ".join(sorted(names))
