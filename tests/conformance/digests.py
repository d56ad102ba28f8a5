"""What a cell's verdict depends on, as one number: our sources, the runner's, the case's own definition."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
SOURCES = ("xdit_compile", "passes", "kernels", "backends")
JUDGES = ("alone", "case", "compare", "observe", "plans", "verdicts", "work", "worker")
LIBRARIES = ("torch", "diffusers", "transformers")


@functools.cache
def sources() -> str:
    """Of everything that all cells depend on."""
    files = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [TESTS / "conformance" / f"{name}.py" for name in JUDGES]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    return _digest([*(path.read_text() for path in files), *versions])


def cell(definition: str, plan: str) -> str:
    """Of one cell, by its case's definition and its plan's arguments."""
    return _digest([sources(), definition, plan])


@functools.cache
def definition(name: str, module: ModuleType) -> str:
    """The source of a case and of all that it names: the call that has ``name`` first, functions and constants of its
    module, and the whole text of modules of ours that it imports."""
    tree, text = _parsed(module)
    (node,) = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _first(node) == name]
    known = {given: stated for stated in tree.body for given in _given(stated)}
    found: dict[str, str] = {}
    _follow(node, known, text, found)
    return _digest([ast.get_source_segment(text, node) or "", *(found[key] for key in sorted(found))])


@functools.cache
def _parsed(module: ModuleType) -> tuple[ast.Module, str]:
    text = inspect.getsource(module)
    return ast.parse(text), text


def _first(node: ast.Call) -> object:
    return node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None


def _given(node: ast.stmt) -> list[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [target.id for target in targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    return []


def _follow(node: ast.AST, known: dict[str, ast.stmt], text: str, found: dict[str, str]) -> None:
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and each.id in known and each.id not in found:
            stated = known[each.id]
            found[each.id] = _imported(stated) or ast.get_source_segment(text, stated) or ""
            _follow(stated, known, text, found)


def _imported(stated: ast.stmt) -> str:
    """The text of a module of ours that a statement imports from, and of all that it imports itself."""
    if not isinstance(stated, ast.ImportFrom) or not stated.module:
        return ""
    return "".join(_text(name) for name in sorted(_reached(stated.module)))


@functools.cache
def _reached(module: str) -> frozenset[str]:
    """A module of ours and all of ours that it imports; nothing of a library's."""
    found: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name not in found and (text := _text(name)):
            found.add(name)
            pending += [
                node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module
            ]
    return frozenset(found)


@functools.cache
def _text(module: str) -> str:
    path = TESTS / (module.replace(".", "/") + ".py")
    return path.read_text() if path.exists() else ""


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]
