"""Entries of a cache in one file, for other machines with the same software and device."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from xdit_compile.errors import UsageError

from .environment import environment, environment_of_target, target_of
from .store import Store

MAGIC = b"xdit_compile bundle 1\n"
LENGTH = 8


def pack(store: Store, file: Path, made_for: dict[str, Any]) -> str:
    """Write all sound entries of a store to a file.

    Args:
        made_for: the `environment` that the entries were made for, or that of a target.

    Returns:
        The SHA-256 of the file, in hex, by which whoever takes it in knows that it is this one.

    Raises:
        OSError: the file cannot be written.
    """
    entries = [entry for each in store.entries() if (entry := store.read(each.kind, each.name)) is not None]
    index = [[each.kind, each.name, each.about, len(each.body)] for each in entries]
    header = json.dumps({"environment": made_for, "entries": index}).encode()
    parts = [MAGIC, len(header).to_bytes(LENGTH, "little"), header, *(each.body for each in entries)]
    digest = hashlib.sha256()
    draft = file.with_name(f".{file.name}.draft")
    with draft.open("wb") as opened:
        for part in parts:
            digest.update(part)
            opened.write(part)
    draft.replace(file)
    return digest.hexdigest()


def unpack(store: Store, file: Path, digest: str, device: torch.device) -> int:
    """Take the entries of a file into a store; what is compiled code is looked at by nobody before the digest fits.

    Args:
        digest: that `pack` gave, in hex.
        device: what the entries must have been made for.

    Returns:
        How many there are.

    Raises:
        UsageError: there is no such file, it is another one than the digest says, no bundle, or made for other software
            or another device.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest.strip().lower():
        raise UsageError(f"{file} is not the file of this digest: copy it again, or give the digest that build printed")
    if not content.startswith(MAGIC):
        raise UsageError(f"{file} is no bundle of this version of xdit_compile")
    begin = len(MAGIC) + LENGTH
    end = begin + int.from_bytes(content[len(MAGIC) : begin], "little")
    header = json.loads(content[begin:end])
    made_for = header["environment"]
    here = environment_of_target(target_of(device) or device.type) if "target" in made_for["device"] else None
    _refuse_other(file, made_for, here or environment(device))
    for kind, name, about, size in header["entries"]:
        store.write(kind, name, about, content[end : end + size])
        end += size
    return len(header["entries"])


def _refuse_other(file: Path, made: dict[str, Any], here: dict[str, Any]) -> None:
    """See that what a bundle was made with is what is here; the first thing that is not is named."""
    here = json.loads(json.dumps(here))
    for field in [field for field in {**made, **here} if made.get(field) != here.get(field)]:
        one, other = made.get(field), here.get(field)
        if isinstance(one, dict) and isinstance(other, dict):
            names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
            one, other, field = one.get(names[0]), other.get(names[0]), f"{field}, {names[0]}"
        raise UsageError(f"{file} was made for {field}: {one!r}, and here it is {other!r}; build it here")
