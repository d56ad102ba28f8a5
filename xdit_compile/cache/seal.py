"""Whom a cache of compiled code may be taken from: a folder of this user's alone, its key, and the seals made with it.

A cached program is code that this process will run. So every file of a cache is sealed with a key that only its owner
can read: what another user, a broken disk or another cache left in its place is noticed before any of it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xdit_compile.errors import UsageError

FORMAT = 1
"""Of a sealed file; to be raised whenever its layout changes."""
KEY_NAME = "key"
_KEY_BYTES = 32
_MAGIC = b"xdit_compile cache\n"
_HEAD_BYTES = len(_MAGIC) + 4
_SEAL_BYTES = 32
_LENGTH_BYTES = 8
_REMOVE = "remove that folder, and it is made anew, or name another one with cache='FOLDER'"


class BrokenSealError(Exception):
    """A file that is not what was sealed under this kind and name with this key; the message says why."""


def seal(key: bytes, kind: str, name: str, about: Mapping[str, Any], body: bytes) -> bytes:
    """A file that holds an entry and shows any change to it.

    It is the magic line and the format, the seal, then kind, name, ``about`` as JSON and body, each behind its length:
    so no byte can move from one of them to the next. The seal is the HMAC-SHA256 of all the others.

    Args:
        key: what ``key_of`` gives.
        kind, name: what the entry is called; it opens under these alone.
        about: what JSON can hold, with words for keys.

    Raises:
        TypeError: ``about`` has what JSON cannot hold.
    """
    head = _MAGIC + FORMAT.to_bytes(4, "big")
    fields = (kind.encode(), name.encode(), json.dumps(about, sort_keys=True).encode(), body)
    content = b"".join(piece for field in fields for piece in (len(field).to_bytes(_LENGTH_BYTES, "big"), field))
    return b"".join((head, _seal_of(key, head, content), content))


def opened(key: bytes, kind: str, name: str, sealed: bytes) -> tuple[dict[str, Any], bytes]:
    """What was sealed under a kind and a name: ``about`` and the body.

    Raises:
        BrokenSealError: it was changed, cut short, sealed with another key, for another entry or in another format.
    """
    view = memoryview(sealed)
    if view[: len(_MAGIC)] != _MAGIC or len(view) < _HEAD_BYTES + _SEAL_BYTES:
        raise BrokenSealError("it is no file of this cache, or was cut short")
    written = int.from_bytes(view[len(_MAGIC) : _HEAD_BYTES], "big")
    if written != FORMAT:
        raise BrokenSealError(f"it is of format {written}, and this version of xdit_compile reads format {FORMAT}")
    content = view[_HEAD_BYTES + _SEAL_BYTES :]
    expected = _seal_of(key, view[:_HEAD_BYTES], content)
    if not hmac.compare_digest(expected, view[_HEAD_BYTES : _HEAD_BYTES + _SEAL_BYTES]):
        raise BrokenSealError("its seal does not fit: it was changed, cut short, or sealed with another key")
    sealed_kind, sealed_name, about, body = _fields(content)
    if (bytes(sealed_kind), bytes(sealed_name)) != (kind.encode(), name.encode()):
        raise BrokenSealError(f"it was sealed as {bytes(sealed_kind).decode()}/{bytes(sealed_name).decode()}")
    return json.loads(bytes(about)), bytes(body)


def _seal_of(key: bytes, head: bytes | memoryview, content: bytes | memoryview) -> bytes:
    code = hmac.new(key, head, "sha256")
    code.update(content)
    return code.digest()


def _fields(content: memoryview) -> list[memoryview]:
    """The four fields of a content whose seal fits."""
    fields, position = [], 0
    for _ in range(4):
        start = position + _LENGTH_BYTES
        position = start + int.from_bytes(content[position:start], "big")
        fields.append(content[start:position])
    return fields


def private_folder(path: Path) -> Path:
    """See that only this user can write to a folder; where there is none, make one that is closed to all others.

    Raises:
        UsageError: it is no folder, another user's, or one that others can write to.
        OSError: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"cache folder {path} is no folder; name another one with cache='FOLDER'") from error
    state = path.stat()
    _check_owner(path, state, "name a folder of your own with cache='FOLDER'")
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(
            f"others can write to cache folder {path}; run chmod go-w on it, or name another one with cache='FOLDER'"
        )
    return path


def key_of(folder: Path) -> bytes:
    """The key of a cache folder, made when it is first asked for; processes that ask at once get the same.

    Raises:
        UsageError: the key is a link, another user's, one that others can read, or cut short.
        OSError: it cannot be read or made.
    """
    path = folder / KEY_NAME
    try:
        return _read_key(path)
    except FileNotFoundError:
        _make_key(path)
    return _read_key(path)


def _make_key(path: Path) -> None:
    """Write a new key whole under another name, then link it: where there is a key by now, that one stays."""
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=".key-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)


def _read_key(path: Path) -> bytes:
    try:
        key, state = regular_file(path)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EINVAL):
            raise UsageError(f"{path} is no regular file, as the key of a cache is; {_REMOVE}") from error
        if error.errno == errno.EACCES:
            _check_owner(path, path.lstat(), _REMOVE)
        raise
    _check_owner(path, state, _REMOVE)
    if state.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"others can read or write {path}, and could seal code of theirs with it; {_REMOVE}")
    if len(key) != _KEY_BYTES:
        raise UsageError(f"{path} has {len(key)} bytes, not {_KEY_BYTES}; {_REMOVE}")
    return key


def _check_owner(path: Path, state: os.stat_result, change: str) -> None:
    if state.st_uid != os.geteuid():
        raise UsageError(
            f"{path} belongs to user {state.st_uid}, and user {os.geteuid()} would run code from there; {change}"
        )


def regular_file(path: Path) -> tuple[bytes, os.stat_result]:
    """The bytes of a file, read once, with the state of the very file that they were read from.

    Raises:
        OSError: it cannot be read; with ``ELOOP`` it is a symbolic link, with ``EINVAL`` a folder, pipe or device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.ExitStack() as closing:
        closing.callback(os.close, descriptor)
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(), state
