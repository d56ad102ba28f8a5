"""Entries of a cache on disk: sealed files that are read once, written whole, and dropped least recently used first."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xdit_compile.errors import UsageError, one_line

from .folder import AUTO, resolve
from .seal import KEY_NAME, BrokenSealError, key_of, opened, private_folder, regular_file, seal

DEFAULT_LIMIT = 10 * 2**30
"""Bytes that a cache may take."""
_KIND = re.compile(r"[a-z]{1,32}")
_NAME = re.compile(r"[0-9a-f]{8,128}")
_DRAFT_PREFIX = ".draft-"
_DRAFT_SECONDS = 3600
"""An unfinished file as old as this was left by a process that is gone."""
logger = logging.getLogger("xdit_compile")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was kept under a kind and a name, its seal checked: what it is about, in words of JSON, and its body."""

    kind: str
    name: str
    about: dict[str, Any]
    body: bytes


@dataclasses.dataclass(frozen=True)
class Listed:
    """A file of a cache: its bytes on disk, when it was last used (seconds since 1970), and what it is about."""

    kind: str
    name: str
    size: int
    used: float
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def open_store(cache: str | os.PathLike[str] | None) -> Store | None:
    """The store that a plan asks for; None where nothing is kept.

    Args:
        cache: as for `folder.resolve`.

    Raises:
        UsageError: a folder that was named is another user's, or open to others.
    """
    folder = resolve(cache)
    if folder is None:
        return None
    try:
        store = Store(folder)
    except UsageError as error:
        if cache != AUTO:
            raise
        logger.warning("nothing is kept for later runs: %s", error)
        return None
    return store if store.usable else None


class Store:
    """A folder of sealed entries, which any number of processes of one user may read and write at once.

    Entries are files ``FOLDER/kind/name``. A kind is a plain word such as ``program``, a name a hex digest of all that
    the entry depends on. A disk that is full, broken or not to be written costs one warning and the cache, never the
    program that wanted it.

    Args:
        folder: made where it is not there.
        limit: bytes that all entries may take, beyond which those used least recently are dropped; None for no limit.

    Raises:
        UsageError: the folder or its key is another user's, or open to others.
    """

    def __init__(self, folder: Path, limit: int | None = DEFAULT_LIMIT):
        self.folder = folder
        self.limit = limit
        self._total: int | None = None
        self._told: set[Path] = set()
        self._writes = True
        self._key: bytes | None = None
        try:
            self._key = key_of(private_folder(folder))
        except OSError as error:
            self._stop_writing(error)

    @property
    def usable(self) -> bool:
        """Whether the folder could be opened at all."""
        return self._key is not None

    def read(self, kind: str, name: str) -> Entry | None:
        """An entry that counts as used from now on; None where there is none.

        A file that is broken, or was sealed by anything but this very cache, is told, removed, and no entry.

        Raises:
            ValueError: this is no kind, or no name.
        """
        path = self._path(kind, name)
        try:
            entry = self._entry(kind, name)
        except FileNotFoundError:
            return None
        except BrokenSealError as error:
            self._drop_broken(path, str(error))
            return None
        except OSError as error:
            self._tell_once(path, f"cannot be read, so it is compiled anew: {one_line(error)}")
            return None
        with contextlib.suppress(OSError):
            os.utime(path, follow_symlinks=False)
        return entry

    def write(self, kind: str, name: str, about: Mapping[str, Any], body: bytes) -> bool:
        """Keep an entry, in the place of one of the same name; says whether it was kept.

        Args:
            about: what JSON can hold, with words for keys; ``for`` says what the entry is for, in a few words.

        Raises:
            ValueError: this is no kind, or no name.
            TypeError: ``about`` has what JSON cannot hold.
        """
        path = self._path(kind, name)
        if self._key is None or not self._writes:
            return False
        sealed = seal(self._key, kind, name, about, body)
        if self.limit is not None and len(sealed) > self.limit:
            self._tell_once(path, f"is not kept: its {len(sealed)} bytes are more than the limit of {self.limit}")
            return False
        try:
            self._put(path, sealed)
        except OSError as error:
            self._stop_writing(error)
            return False
        return True

    def listed(self) -> list[Listed]:
        """Every file of an entry, by kind and name, without a look inside: ``about`` is empty."""
        return sorted(self._files(), key=lambda listed: (listed.kind, listed.name))

    def entries(self) -> list[Listed]:
        """Every entry whose seal fits, by kind and name, with what it is about. Reads all files."""
        return [listed for listed, sound in self.verify() if sound]

    def verify(self, among: Iterable[Listed] | None = None) -> list[tuple[Listed, bool]]:
        """Whether seals fit, of some files or of all; those that do come with what they are about. Changes nothing."""
        checked = []
        for listed in self.listed() if among is None else among:
            try:
                about = self._entry(listed.kind, listed.name).about
                checked.append((dataclasses.replace(listed, about=about), True))
            except FileNotFoundError:
                continue
            except (BrokenSealError, OSError):
                checked.append((listed, False))
        return checked

    def remove(self, kind: str, name: str) -> bool:
        """Remove an entry; says whether it was there and could be removed.

        Raises:
            ValueError: this is no kind, or no name.
        """
        self._total = None
        try:
            self._path(kind, name).unlink()
        except OSError:
            return False
        return True

    def prune(self, limit: int) -> list[Listed]:
        """Remove entries, those used least recently first, until the others take ``limit`` bytes; returns what is gone.

        What writers that are gone left unfinished is removed, too.
        """
        self._remove_stale_drafts()
        waiting = sorted(self._files(), key=lambda listed: listed.used)
        total = sum(listed.size for listed in waiting)
        removed = []
        for listed in waiting:
            if total <= limit:
                break
            if self.remove(listed.kind, listed.name):
                removed.append(listed)
            elif os.path.lexists(self._path(listed.kind, listed.name)):
                continue
            total -= listed.size
        self._total = total
        return removed

    def clear(self) -> list[Listed]:
        """Remove every entry, sound or not; the key stays. Returns those removed."""
        return self.prune(-1)

    def _path(self, kind: str, name: str) -> Path:
        if not _is_kind(kind):
            raise ValueError(f"kind {kind!r} is no plain word")
        if not _NAME.fullmatch(name):
            raise ValueError(f"name {name!r} is no hex digest")
        return self.folder / kind / name

    def _entry(self, kind: str, name: str) -> Entry:
        if self._key is None:
            raise FileNotFoundError(errno.ENOENT, "the cache has no key")
        try:
            sealed, _ = regular_file(self._path(kind, name))
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL):
                raise BrokenSealError("it is no regular file") from error
            raise
        about, body = opened(self._key, kind, name, sealed)
        return Entry(kind, name, about, body)

    def _put(self, path: Path, sealed: bytes) -> None:
        """Write a file whole under another name, then move it to its place, and see that all stay within the limit."""
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=_DRAFT_PREFIX)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(sealed)
            replaced = path.lstat().st_size if os.path.lexists(path) else 0
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        if self._total is None:
            self._total = sum(listed.size for listed in self._files())
        else:
            self._total += len(sealed) - replaced
        if self.limit is not None and self._total > self.limit:
            self.prune(self.limit)

    def _files(self) -> Iterator[Listed]:
        for kind, file in self._inside_kinds():
            if _NAME.fullmatch(file.name):
                with contextlib.suppress(FileNotFoundError):
                    state = file.stat(follow_symlinks=False)
                    yield Listed(kind, file.name, state.st_size, state.st_mtime)

    def _remove_stale_drafts(self) -> None:
        for _, file in self._inside_kinds():
            if file.name.startswith(_DRAFT_PREFIX):
                with contextlib.suppress(OSError):
                    if time.time() - file.stat(follow_symlinks=False).st_mtime > _DRAFT_SECONDS:
                        os.unlink(file.path)

    def _inside_kinds(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        for folder in _inside(self.folder):
            if _is_kind(folder.name) and folder.is_dir(follow_symlinks=False):
                for file in _inside(folder.path):
                    yield folder.name, file

    def _drop_broken(self, path: Path, reason: str) -> None:
        self._total = None
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._tell_once(path, f"is left out, but cannot be removed ({one_line(error)}): {reason}")
        else:
            logger.warning("cached file %s is removed: %s", path, reason)

    def _tell_once(self, path: Path, what: str) -> None:
        if path not in self._told:
            self._told.add(path)
            logger.warning("cached file %s %s", path, what)

    def _stop_writing(self, error: OSError) -> None:
        self._writes = False
        logger.warning("nothing more is kept in cache folder %s: %s", self.folder, one_line(error))


def _is_kind(word: str) -> bool:
    return bool(_KIND.fullmatch(word)) and word != KEY_NAME


def _inside(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds; nothing where it is gone."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []
