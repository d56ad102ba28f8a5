"""Whether a pipeline makes images or videos, read in the source of its call: nothing is imported or loaded."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdit_compile.weights.model_folder import pipeline_index

IMAGES = ("images", "image")
VIDEOS = ("frames", "video", "videos")
"""How fields of a pipeline's result are called that hold pictures."""
KINDS = {"images": IMAGES, "videos": VIDEOS}
CALL = "__call__"


def kind_in_folder(folder: Path) -> str | None:
    """What the pipeline of a folder makes: ``images``, ``videos``, or else the names of what it returns.

    ``None`` where its source does not say it.
    """
    name = pipeline_index(folder).get("_class_name")
    if isinstance(name, list) and len(name) == 2 and all(isinstance(each, str) for each in name):
        return _kind_in_file(folder / f"{name[0]}.py", name[1])
    if not isinstance(name, str) or not (root := _diffusers()):
        return None
    begin = f"class {name}(".encode()
    files = sorted(root.rglob("pipeline*.py"), key=lambda file: name.lower()[:6] not in file.name.replace("_", ""))
    return next((_kind_in_file(file, name) for file in files if begin in file.read_bytes()), None)


def kind_of(pipeline: Any) -> str | None:
    """The same of a pipeline that is loaded."""
    try:
        source = textwrap.dedent(inspect.getsource(type(pipeline).__call__))
    except (OSError, TypeError):
        return None
    return _kind(ast.parse(source))


def _diffusers() -> Path | None:
    spec = importlib.util.find_spec("diffusers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "pipelines"


def _kind_in_file(file: Path, name: str) -> str | None:
    try:
        tree = ast.parse(file.read_text())
    except (OSError, SyntaxError, UnicodeError):
        return None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    call = next(_calls(classes, name), None)
    return None if call is None else _kind(call)


def _calls(classes: dict[str, ast.ClassDef], name: str) -> Iterator[ast.FunctionDef]:
    """The ``__call__`` of a class and those of its bases in the same file, nearest first."""
    if (node := classes.pop(name, None)) is None:
        return
    yield from (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == CALL)
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _calls(classes, base.id)


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
