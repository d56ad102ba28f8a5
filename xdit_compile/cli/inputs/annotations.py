"""What the arguments of a pipeline's call take, as its source annotates them, and whether a text is such a value."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from typing import Any

from xdit_compile.errors import UsageError
from xdit_compile.plan.nearest import did_you_mean

_PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}
_TYPES = {"int": int, "bool": bool, "str": str, "None": type(None)}
_EXAMPLES = {"int": "1, 2", "float": "0.5, 1.0", "bool": "true, false", "str": '"one", "two"'}
_LISTS = ("list", "List", "tuple", "Tuple", "Sequence")
_DICTS = ("dict", "Dict", "Mapping")
_UNIONS = ("Optional", "Union")
_FOREIGN = ("Callable",)
"""Names besides dotted ones, as ``torch.Tensor``, of what no text stands for."""


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument of a call.

    Args:
        annotation: what it is said to take; None where nothing is said.
        default: what it is without a value; None where that is not to be seen.
    """

    annotation: ast.expr | None
    default: ast.expr | None = None

    def value(self, text: str) -> Any:
        """What a text stands for: JSON where the argument takes that, else text.

        Raises:
            ValueError: the argument takes neither; says what it takes.
        """
        read = json_or_text(text)
        forms = _forms(self.annotation)
        if not forms or (read is None and self._is_none()) or _same_type(read, self.default):
            return read
        for value in (read, text):
            for form in forms:
                if _fits(value, form):
                    return tuple(value) if isinstance(value, list) and _name(form).lower() == "tuple" else value
        words = dict.fromkeys(word for form in forms if (word := _words(form)))
        if not set(words) - {_PLAIN["None"]}:
            raise ValueError(f"takes {ast.unparse(forms[0])}, which no text stands for; give it in Python")
        raise ValueError(f"takes {' or '.join(words)}")

    def _is_none(self) -> bool:
        return isinstance(self.default, ast.Constant) and self.default.value is None


def arguments_of(call: ast.FunctionDef) -> dict[str, Argument]:
    """The arguments of a method by name, ``self`` left out."""
    positional, keyword = [*call.args.posonlyargs, *call.args.args], call.args.kwonlyargs
    defaults = [*[None] * (len(positional) - len(call.args.defaults)), *call.args.defaults, *call.args.kw_defaults]
    both = zip([*positional, *keyword], defaults, strict=True)
    return {each.arg: Argument(each.annotation, default) for each, default in list(both)[1:]}


def assigned_to(arguments: dict[str, Argument], texts: dict[str, str]) -> dict[str, Any]:
    """Values for the arguments of a pipeline's call.

    Args:
        texts: what ``--set`` gives them, by name.

    Raises:
        UsageError: the call has no argument of a name, or one takes no such value.
    """
    for name in texts:
        if name not in arguments:
            near = did_you_mean(name, arguments) or f"; it takes {', '.join(arguments)}"
            raise UsageError(f"--set {name}: this pipeline takes no argument of that name{near}")
    values = {}
    for name, text in texts.items():
        try:
            values[name] = arguments[name].value(text)
        except ValueError as error:
            raise UsageError(f"--set {name}={text}: {name} {error}") from None
    return values


def json_or_text(text: str) -> Any:
    """A value as JSON has it, or Python's words for true, false and nothing; else the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def _forms(annotation: ast.expr | None) -> list[ast.expr]:
    """The kinds of values of an annotation, one by one; none where something else may be meant too."""
    if annotation is None:
        return []
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _forms(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp):
        each = [_forms(annotation.left), _forms(annotation.right)]
    elif isinstance(annotation, ast.Subscript) and _name(annotation) in _UNIONS:
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        each = [_forms(one) for one in inner]
        each += [[ast.Constant(None)]] if _name(annotation) == "Optional" else []
    else:
        known = {*_PLAIN, *_LISTS, *_DICTS, *_FOREIGN}
        is_known = _name(annotation) in known or "." in _name(annotation)
        return [annotation] if is_known else []
    return [form for forms in each for form in forms] if all(each) else []


def _name(form: ast.expr) -> str:
    return ast.unparse(form.value if isinstance(form, ast.Subscript) else form)


def _inner(form: ast.expr) -> list[ast.expr]:
    """What the entries of a list or tuple are; none where that is not said."""
    if not isinstance(form, ast.Subscript):
        return []
    entries = form.slice.elts if isinstance(form.slice, ast.Tuple) else [form.slice]
    each = [_forms(entry) for entry in entries if ast.unparse(entry) != "..."]
    return [one for forms in each for one in forms] if all(each) else []


def _fits(value: Any, form: ast.expr) -> bool:
    name = _name(form)
    if name in _LISTS:
        inner = _inner(form)
        return isinstance(value, list) and all(not inner or any(_fits(one, each) for each in inner) for one in value)
    if name in _DICTS:
        return isinstance(value, dict)
    if name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is _TYPES.get(name)


def _words(form: ast.expr) -> str:
    """A kind of values in words; empty where no text stands for one."""
    name = _name(form)
    if name in _LISTS:
        inner = list(map(_name, _inner(form)))
        if not inner:
            return "a list"
        return f"a list such as [{_EXAMPLES[inner[0]]}]" if inner[0] in _EXAMPLES else ""
    return 'an object such as {"scale": 0.5}' if name in _DICTS else _PLAIN.get(name, "")


def _same_type(value: Any, default: ast.expr | None) -> bool:
    """Whether a value is of its default's type, whatever the annotation says."""
    if not isinstance(default, ast.Constant) or isinstance(value, str | None):
        return False
    return type(value) is type(default.value)
