"""Entries in one file for other machines: taken in by its digest alone, and where all fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xdit_compile.cache.bundle import pack, unpack
from xdit_compile.cache.environment import environment
from xdit_compile.cache.store import Store
from xdit_compile.errors import UsageError

CPU = torch.device("cpu")
NAME = "ab" * 32


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, str]:
    store = Store(tmp_path / "one")
    store.write("program", NAME, {"for": "a call"}, b"graphs")
    store.write("code", NAME, {"for": "some operators"}, bytes(range(256)))
    return tmp_path / "bundle", pack(store, tmp_path / "bundle", environment(CPU))


def test_entries_come_over(packed: tuple[Path, str], tmp_path: Path) -> None:
    file, digest = packed
    store = Store(tmp_path / "other")
    assert unpack(store, file, digest.upper(), CPU) == 2
    entry = store.read("code", NAME)
    assert entry is not None and entry.body == bytes(range(256)) and entry.about == {"for": "some operators"}
    assert (tmp_path / "one" / "key").read_bytes() != (tmp_path / "other" / "key").read_bytes()


@pytest.mark.parametrize("change", ["flip", "short", "other digest", "gone"])
def test_another_file_is_not_looked_at(packed: tuple[Path, str], tmp_path: Path, change: str) -> None:
    file, digest = packed
    content = bytearray(file.read_bytes())
    if change == "flip":
        content[-1] ^= 1
    file.write_bytes(content[:-1] if change == "short" else content)
    if change == "gone":
        file.unlink()
    store = Store(tmp_path / "other")
    with pytest.raises(UsageError, match="cannot be read" if change == "gone" else "is not the file of this digest"):
        unpack(store, file, "0" * 64 if change == "other digest" else digest, CPU)
    assert not store.listed()


def test_other_software_is_named(packed: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    with pytest.raises(UsageError, match=r"was made for versions, torch: '2\..*', and here it is '9.9.9'; build it"):
        unpack(Store(tmp_path / "other"), *packed, CPU)
