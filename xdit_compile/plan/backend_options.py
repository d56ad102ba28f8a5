"""Options that are handed to a compiler as they are: how they are written, and which ones inductor has.

The names and types of inductor's settings are read in the source of the torch that is installed, which is not imported:
a misspelt one is told at once.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xdit_compile.errors import UsageError

Options = tuple[tuple[str, Any], ...]
GRAPHS = "triton.cudagraphs"
"""The setting that asks for CUDA graphs."""
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_BOOLEAN = (ast.Compare, ast.BoolOp)
_FORM = "write NAME=VALUE,NAME=VALUE or a JSON object"


def parsed(text: str) -> dict[str, Any]:
    """Options of text such as ``max_autotune=true,triton.cudagraphs=false``, or of a JSON object.

    Raises:
        UsageError: it is neither.
    """
    if text.lstrip().startswith("{"):
        try:
            made = json.loads(text)
        except ValueError as error:
            raise UsageError(f"--backend_options {text}: no JSON ({error}); {_FORM}") from None
        return dict(flat(made))
    options: dict[str, Any] = {}
    for each in filter(None, (part.strip() for part in text.split(","))):
        name, is_given, value = (part.strip() for part in each.partition("="))
        if not (name and is_given and value):
            raise UsageError(f"--backend_options {text}: {each!r} has no value; {_FORM}")
        if name in options:
            raise UsageError(f"--backend_options {text}: {name} is there twice; give it once")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def flat(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their full names: those of a mapping inside have its name and a point in front."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def settled(options: Any) -> Any:
    """Options as a plan keeps them: pairs in the order of their names. What are none stay as they are."""
    if isinstance(options, Mapping):
        return tuple(sorted(flat(options), key=lambda pair: str(pair[0])))
    if isinstance(options, list | tuple) and all(isinstance(each, list | tuple) and len(each) == 2 for each in options):
        return tuple(sorted(((name, value) for name, value in options), key=lambda pair: str(pair[0])))
    return options


def problems(options: Any, backend: str) -> list[str]:
    """Every reason against options, each as one clause that says what to change."""
    if not isinstance(options, tuple) or any(not isinstance(name, str) for name, _ in _pairs(options)):
        return [f"backend_options={options!r} must be a mapping of names and values"]
    wrong = [name for name, value in options if not isinstance(value, bool | int | float | str | None)]
    if wrong:
        return [f"backend_options[{name!r}] must be true, false, none, a number or text" for name in wrong]
    if not options:
        return []
    if backend not in ("auto", "inductor", "nexfort"):
        return [f"backend_options are for inductor and nexfort, and backend={backend!r} compiles nothing; change one"]
    return [] if backend == "nexfort" else list(_unknown(dict(options)))


def _pairs(options: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    for each in options:
        yield each if isinstance(each, tuple) and len(each) == 2 else (None, None)


def _unknown(options: Mapping[str, Any]) -> Iterator[str]:
    known = inductor_settings()
    for name, value in options.items() if known else ():
        if name not in known:
            near = _nearest(name, known)
            meant = f"did you mean {' or '.join(near)}?" if near else "torch._inductor.config has their names"
            yield f"backend_options: inductor has no setting {name!r}; {meant}"
        elif not known[name].takes(value):
            yield f"backend_options: {name}={value!r} must be {known[name].said}"


def _nearest(name: str, known: Mapping[str, Any]) -> list[str]:
    """Settings that were meant, maybe: with a like name, or the same one in a group."""
    last = name.rpartition(".")[2]
    grouped = [each for each in known if each.rpartition(".")[2] == last]
    return grouped[:2] or difflib.get_close_matches(name, known, n=2, cutoff=0.7)


class Setting:
    """What a setting takes, as far as its source says.

    Args:
        kinds: names of types that it takes; none where that is not to be seen.
        values: those that it takes, where it lists them.
    """

    def __init__(self, kinds: frozenset[str], values: tuple[Any, ...] = ()):
        self._kinds, self._values = kinds, values

    @property
    def said(self) -> str:
        """The same in words."""
        words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "None": "none"}
        return ", or ".join([*map(str, self._values), *(words[kind] for kind in words if kind in self._kinds)])

    def takes(self, value: Any) -> bool:
        """Whether a value is one of these."""
        if value in self._values or not (self._kinds or self._values):
            return True
        kind = "None" if value is None else type(value).__name__
        return kind in self._kinds or (kind == "int" and "float" in self._kinds)


@functools.cache
def inductor_settings() -> Mapping[str, Setting]:
    """Inductor's settings by their full names; empty where torch, or its source, is not there."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    try:
        tree = ast.parse(Path(folders[0], "_inductor", "config.py").read_text())
    except (IndexError, OSError, SyntaxError):
        return {}
    settings: dict[str, Setting] = {}
    classes: dict[str, dict[str, Setting]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            inherited = [classes.get(base.id, {}) for base in node.bases if isinstance(base, ast.Name)]
            inside = {name: setting for each in [*inherited] for name, setting in each.items()}
            inside |= dict(_assigned(node.body))
            classes[node.name] = inside
            settings |= {f"{node.name}.{name}": setting for name, setting in inside.items()}
    return dict(_assigned(tree.body)) | settings


def _assigned(body: list[ast.stmt]) -> Iterator[tuple[str, Setting]]:
    """The names that statements give values to, with what they take."""
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if not node.target.id.startswith("_"):
                yield node.target.id, _annotated(ast.unparse(node.annotation))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and not target.id.startswith("_"):
                    yield target.id, _of_value(node.value)
        elif isinstance(node, ast.If):
            yield from _assigned([*node.body, *node.orelse])


def _annotated(text: str) -> Setting:
    literal, _, rest = text.partition("Literal[")
    try:
        values = ast.literal_eval(f"({rest.partition(']')[0]},)") if rest else ()
    except (ValueError, SyntaxError):
        return Setting(frozenset())
    plain = (literal + rest.partition("]")[2] if rest else text).replace("Optional[", "None | ").replace("]", "")
    kinds = {each.strip() for each in plain.split("|")} - {""}
    known = frozenset({"bool", "int", "float", "str", "None"})
    return Setting(frozenset(kinds), values) if kinds <= known else Setting(frozenset())


def _of_value(value: ast.expr) -> Setting:
    if isinstance(value, ast.Constant) and value.value is not None:
        return Setting(frozenset({type(value.value).__name__}))
    if isinstance(value, _BOOLEAN) or (isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)):
        return Setting(frozenset({"bool"}))
    return Setting(frozenset())
