"""The files that a command writes: their names and formats, and whether they can be written, seen beforehand."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError, XditCompileError

FORMATS = {"images": (".png", ".jpg", ".jpeg", ".webp"), "videos": (".mp4", ".gif")}
PICTURES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
LATENTS = (".safetensors",)
OUTPUT_TYPES = {"pil": PICTURES, "latent": LATENTS}
"""What a pipeline may return, and the files it is written to: pictures, or latents that no autoencoder decoded."""

ROOM = 2**16
"""Bytes that must fit in a folder that is to be written to."""


def suffixes_for(output_type: str, kind: str | None) -> tuple[str, ...]:
    """The formats of what a pipeline makes, the usual one first.

    Args:
        output_type: one of `OUTPUT_TYPES`.
        kind: as `result_kind` has it; None where that is not known yet.
    """
    return FORMATS.get(kind or "", PICTURES) if output_type == "pil" else OUTPUT_TYPES[output_type]


def check_made(kind: str | None, wanted: Sequence[str] = tuple(FORMATS)) -> None:
    """See that a pipeline makes something that a command can use.

    Raises:
        UsageError: saying what it makes.
    """
    if kind is not None and kind not in wanted:
        raise UsageError(f"this pipeline makes {kind}, and this command takes {' and '.join(wanted)} alone")


def check_format(output: str, output_type: str, kind: str | None) -> None:
    """See that a pipeline can make what a file's ending stands for.

    Raises:
        UsageError: saying what it makes, and how the file may end.
    """
    suffix, suited = Path(output).suffix.lower(), suffixes_for(output_type, kind)
    if suffix not in OUTPUT_TYPES[output_type]:
        what = f" with --output_type {output_type}" if output_type != "pil" else ""
        raise UsageError(f"--output {output} must end in one of {', '.join(suited)}{what}")
    if suffix not in suited:
        raise UsageError(f"--output {output}: this pipeline makes {kind}; end it in one of {', '.join(suited)}")


def check_place(output: str) -> None:
    """See that a file's folder is there, and that the file is none itself.

    Raises:
        UsageError: saying what to change.
    """
    path = Path(output)
    with _looking(output):
        if path.is_dir():
            raise UsageError(f"--output {output} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise UsageError(f"--output {output}: folder {path.parent} does not exist; make it first")


def numbered(output: str, count: int) -> list[Path]:
    """The files of several pictures: ``out.png``, then ``out-1.png`` and so on."""
    path = Path(output)
    return [path if index == 0 else path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def settle(files: Sequence[Path], overwrite: bool, world: World) -> bool:
    """See that files can be written, and ask about those that are there where somebody can answer.

    Args:
        files: all that will be written.
        overwrite: whether those that are there may go.

    Returns:
        Whether they may.

    Raises:
        UsageError: some are there, and nobody can be asked; or one cannot be written.
        XditCompileError: the answer was no.
    """
    check_writable(files)
    taken = [file for file in files if os.path.lexists(file)]
    if not taken or overwrite:
        return overwrite
    if world.launched or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{_there(taken)}; give --overwrite, or another --output")
    if not click.confirm(f"{_there(taken)}. Overwrite?", err=True):
        raise XditCompileError(f"{_named(taken)} stays as it was; give another --output")
    return True


def check_writable(files: Sequence[Path]) -> None:
    """Make and remove a file in every folder that is written to, or in what of it is there.

    Raises:
        UsageError: naming the first file that cannot be written, with the reason.
    """
    for file in files:
        with _looking(str(file)):
            if file.is_dir():
                raise UsageError(f"{file} is a folder; it stands where a file is to be written")
    for folder in dict.fromkeys(_existing(file.parent) for file in files):
        with _looking(str(next(file for file in files if _existing(file.parent) == folder))):
            if not folder.is_dir():
                raise UsageError(f"{folder} is a file; it stands where a folder is needed")
            with tempfile.NamedTemporaryFile(prefix=".xdit-compile-", dir=folder) as tried:
                tried.write(bytes(ROOM))


def _existing(folder: Path) -> Path:
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


@contextlib.contextmanager
def _looking(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error.strerror or error}; give another --output") from error


def _named(files: Sequence[Path]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{files[0]}{more}"


def _there(files: Sequence[Path]) -> str:
    return f"{_named(files)} {'exist' if len(files) > 1 else 'exists'}"
