"""Where compiled programs are kept, and how much room there is: memory, shared memory, disk."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xdit_compile.cache.folder import VARIABLE, resolve
from xdit_compile.cache.seal import KEY_NAME
from xdit_compile.errors import UsageError
from xdit_compile.plan.host import available_memory

from .finding import OK, WARN, Finding, size_said

SHARED = Path("/dev/shm")
LEAST_SHARED = 64 * 2**20
"""Bytes of shared memory that Docker gives where nobody asks for more, on which NCCL fails with many ranks."""
LEAST_MEMORY = 4 * 2**30
LEAST_DISK = 2 * 2**30
LEAST_FILES = 1024


def cache(cache_dir: str | None = None) -> Iterator[Finding]:
    """The folder of compiled programs."""
    folder = resolve("auto" if cache_dir is None else cache_dir)
    if folder is None:
        yield Finding("folder", WARN, f"{VARIABLE} says off: every run compiles anew", f"unset {VARIABLE}")
        return
    entries = [path for path in folder.glob("*/*") if path.is_file()] if folder.is_dir() else []
    held = f"{len(entries)} entries, {size_said(sum(path.stat().st_size for path in entries))}"
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    elsewhere = f"give another with --cache_dir or {VARIABLE}"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield Finding("folder", WARN, f"{folder} cannot be written: nothing is kept", f"allow it, or {elsewhere}")
    else:
        yield Finding("folder", OK, f"{folder}, {held}" if folder.is_dir() else f"{folder}, made at the first run")
    if folder.is_dir():
        yield _privacy(folder, elsewhere)
        yield _key(folder)
    free = shutil.disk_usage(nearest).free
    low = free < LEAST_DISK
    yield Finding(
        "disk", WARN if low else OK, f"{size_said(free)} free there", "xdit-compile cache prune" if low else ""
    )


def _privacy(folder: Path, elsewhere: str) -> Finding:
    from xdit_compile.cache.seal import private_folder

    try:
        private_folder(folder)
    except (UsageError, OSError) as error:
        return Finding("privacy", WARN, f"nothing is kept there: {error}", f"chmod 700 {folder}, or {elsewhere}")
    return Finding("privacy", OK, "only you can write there")


def _key(folder: Path) -> Finding:
    key = folder / KEY_NAME
    if not key.exists():
        return Finding("key", OK, "none yet; made at the first run")
    if not os.access(key, os.R_OK):
        return Finding("key", WARN, f"{key} cannot be read, so that nothing of the cache is used", f"rm -r {folder}")
    return Finding("key", OK, "entries are sealed with it; xdit-compile cache verify checks them")


def memory() -> Iterator[Finding]:
    """Memory that processes may take, shared memory, the folder of temporary files, and open files."""
    free = available_memory()
    if free is not None:
        low = free < LEAST_MEMORY
        remedy = "start fewer processes, or take --tensor_parallel_degree, by which each holds a part" if low else ""
        yield Finding("memory", WARN if low else OK, f"{size_said(free)} available", remedy)
    if SHARED.is_dir():
        size = shutil.disk_usage(SHARED).total
        low = size <= LEAST_SHARED
        remedy = "start the container with --shm-size 1g or --ipc host" if low else ""
        yield Finding("shared memory", WARN if low else OK, f"{size_said(size)} in {SHARED}", remedy)
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    low = free < LEAST_DISK
    yield Finding(
        "temporary files", WARN if low else OK, f"{size_said(free)} free in {folder}", "set TMPDIR" if low else ""
    )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    low = 0 <= files < LEAST_FILES
    yield Finding(
        "open files", WARN if low else OK, "no limit" if files < 0 else f"{files} at once",
        f"ulimit -n {LEAST_FILES}" if low else "",
    )  # fmt: skip
