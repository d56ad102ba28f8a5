"""Bodies that are forms with files, as OpenAI's client sends pictures, or JSON with pictures as data URLs."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from .problems import Problem, problem_of_fields
from .schemas import Asked

A = TypeVar("A", bound=Asked)
FIELDS = 100
FILES = 8


async def read_body(
    request: Request, kind: type[A], names: Mapping[str, str], needed: Sequence[str] = ()
) -> tuple[A, dict[str, bytes]]:
    """A request's fields, and the files in it by the names of the pipeline's arguments.

    Args:
        kind: which fields there are.
        names: fields that are files, and the pipeline's arguments for them.
        needed: files of which one has to be there; any number where there are none.

    Raises:
        Problem: the body is no form or JSON, or its fields are wrong.
    """
    is_form = request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"
    fields, files = await (_of_form(request, names) if is_form else _of_json(request, names))
    if needed and not set(needed) & set(files):
        message = f"{' or '.join(needed)} is missing; send it as a file of a form"
        raise Problem(400, message, needed[0], "missing_required_parameter")
    try:
        asked = kind.model_validate(fields, strict=not is_form)
    except ValidationError as error:
        raise problem_of_fields(error.errors(), [*kind.model_fields, *names]) from error
    return asked, {names[field]: data for field, data in files.items()}


async def _of_form(request: Request, names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    try:
        form = await request.form(max_files=FILES, max_fields=FIELDS)
    except HTTPException as error:
        if isinstance(error, Problem):
            raise
        raise Problem(400, f"the form cannot be read: {error.detail}") from error
    try:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if isinstance(value, UploadFile):
                if name not in names:
                    raise Problem(400, f"{name[:100]} is no field for a file; there are {', '.join(names)}", name[:100])
                _put(files, name, await value.read())
            elif name in names:
                _put(files, name, _data_url(value, name))
            elif inner := re.fullmatch(r"arguments\[([A-Za-z_]\w*)\]", name):
                _put(fields.setdefault("arguments", {}), inner[1], _plain(value))
            else:
                _put(fields, name, _plain(value) if name == "arguments" else value)
    finally:
        await form.close()
    return fields, files


def _put(fields: dict[str, Any], name: str, value: Any) -> None:
    if name in fields:
        raise Problem(400, f"{name[:100]} is there twice; send it once", name[:100], "invalid_value")
    fields[name] = value


def _plain(text: str) -> Any:
    """JSON, or a text where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _of_json(request: Request, names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    try:
        fields = await request.json()
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is neither a form (multipart/form-data) nor JSON") from error
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "send multipart/form-data, or JSON as application/json")
    if not isinstance(fields, dict):
        raise Problem(400, "the body is JSON, but no object")
    files = {}
    for name in names:
        value = fields.pop(name, None)
        if isinstance(value, dict):
            value = value.get("image_url")
        if value is not None:
            files[name] = _data_url(value, name)
    return fields, files


def _data_url(value: Any, name: str) -> bytes:
    """The bytes of a data URL. Nothing is fetched, and no path is opened."""
    head, comma, text = value.partition(",") if isinstance(value, str) else ("", "", "")
    if not (comma and re.fullmatch(r"data:[\w./+-]*(;[\w=.-]+)*;base64", head)):
        raise Problem(400, f"{name} is no data URL (data:image/png;base64,...); nothing is fetched for you", name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem(400, f"{name} is no base64: {error}", name, "invalid_image") from error


def body_of(kind: type[Asked], files: Iterable[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    """What the documentation says of a body that `read_body` reads."""
    schema = kind.model_json_schema()
    pictures = {name: {"type": "string", "format": "binary"} for name in files}
    form = {**schema, "properties": {**pictures, **schema["properties"]}}
    if len(needed) == 1:
        form["required"] = [*schema["required"], *needed]
    elif needed:
        form["anyOf"] = [{"required": [name]} for name in needed]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}
