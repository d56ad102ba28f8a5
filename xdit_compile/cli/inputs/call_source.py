"""The source of a pipeline's call, found from its folder or its class: nothing is imported or loaded for it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdit_compile.weights.model_folder import pipeline_index

CALL = "__call__"
_SCHEDULER = re.compile(r"^class (\w+)\([^)]*\bSchedulerMixin\b", re.MULTILINE)


def call_in_folder(folder: Path) -> ast.FunctionDef | None:
    """The ``__call__`` of the pipeline of a folder; None where its source is not found."""
    name = pipeline_index(folder).get("_class_name")
    if isinstance(name, list) and len(name) == 2 and all(isinstance(each, str) for each in name):
        return _call_in_file(folder / f"{name[0]}.py", name[1])
    if not isinstance(name, str) or not (root := _diffusers()):
        return None
    begin = f"class {name}(".encode()
    files = (root / "pipelines").rglob("pipeline*.py")
    likely = sorted(files, key=lambda file: name.lower()[:6] not in file.name.replace("_", ""))
    return next((_call_in_file(file, name) for file in likely if begin in file.read_bytes()), None)


def call_of(pipeline: Any) -> ast.FunctionDef | None:
    """The same of a pipeline that is loaded."""
    try:
        source = textwrap.dedent(inspect.getsource(type(pipeline).__call__))
    except (OSError, TypeError):
        return None
    return next((node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)), None)


def scheduler_classes() -> list[str]:
    """The names of the schedulers of the installed diffusers; none where it is not there."""
    root = _diffusers()
    files = (root / "schedulers").rglob("*.py") if root is not None else ()
    return sorted({name for file in files for name in _SCHEDULER.findall(file.read_text(errors="replace"))})


def _diffusers() -> Path | None:
    spec = importlib.util.find_spec("diffusers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _call_in_file(file: Path, name: str) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(file.read_text())
    except (OSError, SyntaxError, UnicodeError):
        return None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return next(_calls(classes, name), None)


def _calls(classes: dict[str, ast.ClassDef], name: str) -> Iterator[ast.FunctionDef]:
    """The ``__call__`` of a class and those of its bases in the same file, nearest first."""
    if (node := classes.pop(name, None)) is None:
        return
    yield from (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == CALL)
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _calls(classes, base.id)
