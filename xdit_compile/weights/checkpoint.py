"""Reads a model's weights, whole or in pieces, from safetensors files in one or several shards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from xdit_compile.errors import UsageError, one_line
from xdit_compile.ir.program import WeightSlice

from .weights import cut

NAME = "diffusion_pytorch_model"
MOST_NAMED = 3


class Checkpoint:
    """The tensors of one model's folder by name.

    Only headers are read when it is opened. Every read opens its file anew and closes it, so that pages of a mapped
    file do not stay in memory.

    Args:
        folder: the model's folder.
        variant: the word in the files' names that diffusers calls so (``fp16``).

    Raises:
        UsageError: there are no safetensors files, one is missing, or one is cut short.
    """

    def __init__(self, folder: Path, variant: str | None = None):
        self.folder, self._variant = folder, variant
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, list[int]] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        for file in _files(folder, variant):
            try:
                self._stamps[file] = _stamp(file)
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (no mapping)
                        self._files[name] = file
                        self._shapes[name] = opened.get_slice(name).get_shape()
            except (SafetensorError, OSError) as error:
                raise UsageError(f"{file} is damaged or cut short ({one_line(error)}); download it again") from error

    def check(self, expected: Mapping[str, Sequence[int]]) -> None:
        """See that every tensor of these names is there in this shape.

        Raises:
            UsageError: naming those that are not.
        """
        missing = [name for name in expected if name not in self._shapes]
        if missing:
            raise UsageError(f"{self.folder} lacks the weights of {_some(missing)}; download the whole folder")
        wrong = [
            f"{name} is {tuple(self._shapes[name])} instead of {tuple(shape)}"
            for name, shape in expected.items()
            if list(shape) != self._shapes[name]
        ]
        if wrong:
            raise UsageError(f"{self.folder} does not fit its config.json: {_some(wrong)}")

    def read(self, name: str, pieces: tuple[WeightSlice, ...] = ()) -> torch.Tensor:
        """One tensor, or pieces of it, in memory of its own; the file is mapped, so only what is taken is read.

        Raises:
            UsageError: the file was written to since it was opened.
        """
        file = self._files[name]
        if not file.is_file() or _stamp(file) != self._stamps[file]:
            raise UsageError(
                f"{file} was changed after {name} and others were to be read from it; "
                "call xdit_compile.refresh(pipe) on all ranks to read all of it anew"
            )
        with safe_open(file, "pt") as opened:
            return cut(opened.get_tensor(name), pieces)

    def reopen(self) -> None:
        """Look at the folder anew, as files may have been replaced.

        Raises:
            UsageError: they do not hold tensors of the same names and shapes.
        """
        now = Checkpoint(self.folder, self._variant)
        now.check(self._shapes)
        self._files, self._shapes, self._stamps = now._files, now._shapes, now._stamps


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def _files(folder: Path, variant: str | None) -> list[Path]:
    """The shards that the index lists, or the only file."""
    infix = "" if variant is None else f".{variant}"
    single, index = folder / f"{NAME}{infix}.safetensors", folder / f"{NAME}.safetensors.index{infix}.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{index} cannot be read: {one_line(error)}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UsageError(f"{folder} lacks {_some(missing)} of {len(names)} shards; download the whole folder")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".safetensors", ".pt", ".ckpt"))
    raise UsageError(
        f"{folder} has no {single.name} (it has {_some(others) if others else 'no weights'}); "
        "save it with save_pretrained(..., safe_serialization=True)"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
